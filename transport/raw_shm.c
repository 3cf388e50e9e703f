/*
 * raw, shared memory: bare cache lines, in the fewest transfers between two processors that we know.
 *
 * Exchanges. Up to SMALL bytes, both directions share one line: whoever waits for the answer wrote it last, and polls its
 * own copy until the other side takes the line to answer. A line for each direction takes longer, because the one who
 * waits keeps fetching what the other is about to write. Up to TURNS_MAX bytes lie behind their flag in as few lines as
 * hold them; the one who waits fetches those behind the first, too, so that all of them come at the same time, and the
 * writer leaves the first for the end. Two such slots take turns. Longer messages lie apart from the shared flags.
 *
 * Streams. A message is its payload and, in the eight bytes right behind it, a flag that the writer stores last: as few
 * lines travel as the bytes can fill. Nothing else is written but the credit, once in half a depth. A flag's place may
 * hold payload of an earlier order, so before each order both ends clear the flags that they are going to read and wait
 * for each other.
 *
 * The memory is a sealed memfd that the other end opens through /proc: the kernel lets only a process of the same user
 * do so, and what was opened must be of that user and hold the number that the offer names.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "mem_region.h"
#include "hist.h"
#include "inside.h"
#include "raw_inside.h"
#include "shm_copy.h"

#define PAIR_BYTES ((size_t)128) /* adjacent lines are fetched in pairs: what differs in owner stays that far apart */
#define SPINS      512u          /* polls before raw_idle, which does more than poll */
#define SMALL      24u
#define TURNS_MAX  256u /* bytes up to which an exchange's slots take turns: not more than stays in the caches */
#define BESIDE     (CACHE_LINE - sizeof(uint64_t)) /* bytes of a message in its flag's line */
#define SEALS      (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)

struct half {
        _Atomic uint64_t flag; /* of an exchange: which one this is */
        unsigned char small[SMALL];
};

_Static_assert(2 * sizeof(struct half) == CACHE_LINE, "both directions share a line");

struct area_head {
        uint64_t nonce, area_bytes;
        /* [0] the end that offered, [1] the one that answered: orders that it is ready for. */
        struct {
                _Alignas(128) _Atomic uint64_t n;
        } ready[2];
        _Alignas(128) _Atomic uint64_t credit; /* of a stream: messages consumed */
        _Alignas(128) struct half halves[2];   /* of one line: [0] up, [1] down */
        _Alignas(4096) unsigned char slots[];
};

struct shm_blob { /* in a struct raw_blob; both ends are on one host, so the host's byte order is theirs */
        uint64_t nonce, area_bytes;
        int32_t pid, fd;
};

_Static_assert(sizeof(struct shm_blob) <= RAW_BLOB_BYTES, "fits a blob");

struct shm_end {
        struct raw_end base;
        struct area_head *area;
        size_t mapped, area_bytes; /* all; of one direction */
        unsigned char *src;        /* what the serving end sends back */
        size_t src_bytes;
        unsigned side;
        int fd; /* until the other end has it, then -1 */
        uint64_t nonce, orders;
};

static struct shm_end *end_of(struct raw_end *e)
{
        return container_of(e, struct shm_end, base);
}

/* ---- the layout that an order asks for ---- */

static size_t flag_at(size_t size)
{
        return ALIGN_UP(size, sizeof(uint64_t));
}

static size_t stride_of(size_t size)
{
        return ALIGN_UP(flag_at(size) + sizeof(uint64_t), PAIR_BYTES);
}

static unsigned char *direction(const struct shm_end *e, bool up)
{
        return e->area->slots + (up ? 0 : e->area_bytes);
}

/* ---- set-up ---- */

static const char *shm_unavailable(void)
{
        return NULL;
}

static void shm_end_free(struct raw_end *base)
{
        struct shm_end *e = end_of(base);

        if (e->area)
                munmap(e->area, e->mapped);
        if (e->src)
                munmap(e->src, e->src_bytes);
        if (e->fd >= 0)
                close(e->fd);
        free(e);
}

static int no_memory(const struct raw_opts *o, int rc)
{
        return err_set(rc, "raw shm: %u slots of %zu bytes: %s", o->depth, o->max_bytes, strerror(-rc));
}

/* Bytes of one direction: a slot for each message in flight, and for those of an exchange that take turns at least two. */
static int size_area(const struct raw_opts *o, size_t *area_bytes, size_t *total)
{
        size_t turns = 2 * stride_of(o->max_bytes < TURNS_MAX ? o->max_bytes : TURNS_MAX), stride;

        if (!size_add(o->max_bytes, 2 * PAIR_BYTES, &stride) ||
            !size_mul(stride_of(o->max_bytes), o->depth, area_bytes))
                return no_memory(o, -EOVERFLOW);
        *area_bytes = *area_bytes > turns ? *area_bytes : turns;
        if (!size_mul(*area_bytes, 2, total) || !size_add(*total, sizeof(struct area_head), total))
                return no_memory(o, -EOVERFLOW);
        return 0;
}

/* Page faults belong to set-up. */
static void *map_bytes(size_t bytes, int how, int fd)
{
        void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, how | MAP_POPULATE, fd, 0);

        return p == MAP_FAILED ? NULL : p;
}

static int map_area(struct shm_end *e)
{
        e->area = map_bytes(e->mapped, MAP_SHARED, e->fd);
        return e->area ? 0 : -errno;
}

/* The end without its memory. 0 or -errno with a sentence. */
static int end_new(const struct raw_opts *o, unsigned side, struct shm_end **out)
{
        struct shm_end *e = calloc(1, sizeof(*e));
        int rc;

        if (!e)
                return no_memory(o, -ENOMEM);
        e->side = side;
        e->fd = -1;
        rc = size_area(o, &e->area_bytes, &e->mapped);
        if (rc == 0) {
                e->src_bytes = o->max_bytes;
                e->src = map_bytes(e->src_bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
                if (!e->src)
                        rc = no_memory(o, -ENOMEM);
        }
        if (rc < 0) {
                shm_end_free(&e->base);
                return rc;
        }
        *out = e;
        return 0;
}

static int make_area(struct shm_end *e)
{
        e->fd = memfd_create("djinnbench-raw", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (e->fd < 0 || ftruncate(e->fd, (off_t)e->mapped) < 0 || fallocate(e->fd, 0, 0, (off_t)e->mapped) < 0 ||
            fcntl(e->fd, F_ADD_SEALS, SEALS) < 0)
                return -errno;
        return map_area(e);
}

static int shm_offer(const struct raw_opts *o, struct raw_blob *offer, struct raw_end **out)
{
        struct shm_end *e;
        struct shm_blob b;
        int rc = end_new(o, 0, &e);

        if (rc < 0)
                return rc;
        if ((rc = make_area(e)) < 0) {
                shm_end_free(&e->base);
                return no_memory(o, rc);
        }
        e->nonce = tpi_random();
        e->area->nonce = e->nonce;
        e->area->area_bytes = e->area_bytes;
        b = (struct shm_blob){.nonce = e->nonce, .area_bytes = e->area_bytes, .pid = getpid(), .fd = e->fd};
        memcpy(offer->bytes, &b, sizeof(b));
        *out = &e->base;
        return 0;
}

/* What was opened must be sealed memory of our own user and large enough before it is mapped. */
static int check_area(const struct shm_end *e)
{
        int seals = fcntl(e->fd, F_GET_SEALS);
        struct stat st;

        if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(e->fd, &st) < 0)
                return -EPROTO;
        if (st.st_uid != geteuid())
                return -EPERM;
        return st.st_size >= 0 && (uint64_t)st.st_size >= e->mapped ? 0 : -EPROTO;
}

static int open_area(struct shm_end *e, const struct shm_blob *b)
{
        char path[64];
        int rc;

        snprintf(path, sizeof(path), "/proc/%d/fd/%d", (int)b->pid, (int)b->fd);
        e->fd = open(path, O_RDWR | O_CLOEXEC);
        if (e->fd < 0)
                return -errno;
        if ((rc = check_area(e)) < 0 || (rc = map_area(e)) < 0)
                return rc;
        close(e->fd);
        e->fd = -1;
        return e->area->nonce == b->nonce && e->area->area_bytes == e->area_bytes ? 0 : -EPROTO;
}

static int shm_answer(const struct raw_opts *o, const struct raw_blob *offer, struct raw_blob *answer,
                      struct raw_end **out)
{
        struct shm_end *e;
        struct shm_blob b;
        int rc = end_new(o, 1, &e);

        if (rc < 0)
                return rc;
        memcpy(&b, offer->bytes, sizeof(b));
        if (e->area_bytes != b.area_bytes)
                rc = err_set(-EPROTO, "raw shm: the ends are set up for other sizes or depths");
        if (rc == 0 && (rc = open_area(e, &b)) < 0)
                err_set(rc,
                        "raw shm: memory of process %d, descriptor %d: %s; both ends must be of one user on one host",
                        (int)b.pid, (int)b.fd, strerror(-rc));
        if (rc < 0) {
                shm_end_free(&e->base);
                return rc;
        }
        e->base.other = b.pid;
        b.pid = getpid();
        memcpy(answer->bytes, &b, sizeof(b));
        *out = &e->base;
        return 0;
}

static int shm_settle(struct raw_end *base, const struct raw_blob *answer)
{
        struct shm_end *e = end_of(base);
        struct shm_blob b;

        memcpy(&b, answer->bytes, sizeof(b));
        if (b.nonce != e->nonce)
                return err_set(-EPROTO, "raw shm: the answer is to another offer");
        base->other = b.pid;
        close(e->fd);
        e->fd = -1;
        return 0;
}

/* ---- waiting ---- */

static __attribute__((cold, noinline)) int wait_long(struct raw_end *e, _Atomic uint64_t *word, uint64_t least)
{
        int rc = 0;

        while (!rc && atomic_load_explicit(word, memory_order_acquire) < least)
                rc = raw_idle(e);
        raw_moved(e);
        return rc;
}

static inline int wait_for(struct raw_end *e, _Atomic uint64_t *word, uint64_t least)
{
        for (unsigned i = 0; i < SPINS; i++) {
                if (atomic_load_explicit(word, memory_order_acquire) >= least)
                        return 0;
                cpu_relax(); /* leaves the line to the side that wants to write it */
        }
        return wait_long(e, word, least);
}

/* This end has cleared the flags that it will read. */
static int line_up(struct shm_end *e)
{
        atomic_store_explicit(&e->area->ready[e->side].n, ++e->orders, memory_order_release);
        return wait_long(&e->base, &e->area->ready[!e->side].n, e->orders);
}

/* ---- exchanges ---- */

/* One direction of an exchange: where message i lies, and the flag that says so. */
struct lane {
        _Atomic uint64_t *flags[2];
        unsigned char *slots[2];
        size_t size;
        size_t behind; /* bytes in lines behind that of the flag, if it is the message's own */
};

static struct lane lane_of(const struct shm_end *e, bool up, size_t size)
{
        struct half *half = &e->area->halves[up ? 0 : 1];
        struct lane l = {.flags = {&half->flag, &half->flag}, .slots = {half->small, half->small}, .size = size};

        for (int i = 0; i < 2 && size > SMALL; i++) {
                l.slots[i] = direction(e, up);
                if (size > TURNS_MAX)
                        continue;
                BUG_ON(2 * stride_of(size) > e->area_bytes);
                l.flags[i] = (_Atomic uint64_t *)(void *)(l.slots[i] + (size_t)i * stride_of(size));
                l.slots[i] = (unsigned char *)(l.flags[i] + 1);
                l.behind = size > BESIDE ? size - BESIDE : 0;
        }
        return l;
}

static inline void put(const struct lane *l, const void *src, uint64_t i)
{
        size_t first = l->size - l->behind;

        shm_copy(l->slots[i % 2] + first, (const unsigned char *)src + first, l->behind);
        __asm__ volatile("" ::: "memory");
        shm_copy(l->slots[i % 2], src, first);
        atomic_store_explicit(l->flags[i % 2], i, memory_order_release);
}

static inline int wait_message(struct raw_end *e, const struct lane *l, uint64_t i)
{
        _Atomic uint64_t *flag = l->flags[i % 2];

        for (unsigned k = 0; k < SPINS; k++) {
                if (atomic_load_explicit(flag, memory_order_acquire) >= i)
                        return 0;
                for (size_t at = 0; at < l->behind; at += CACHE_LINE)
                        __builtin_prefetch(l->slots[i % 2] + BESIDE + at);
                cpu_relax();
        }
        return wait_long(e, flag, i);
}

static void clear(const struct lane *l)
{
        for (int i = 0; i < 2; i++)
                atomic_store_explicit(l->flags[i], 0, memory_order_relaxed);
}

static int drive_exchange(struct shm_end *e, const struct raw_order *o, const void *src, void *dst,
                          struct hist *round_trips)
{
        const struct lane up = lane_of(e, true, o->up), down = lane_of(e, false, o->down);
        uint64_t t0, t1;
        int rc;

        clear(&down);
        rc = line_up(e);
        e->base.started_ns = clock_ns();
        t0 = clock_stamp();
        for (uint64_t i = 1; i <= o->n && !rc; i++) {
                put(&up, src, i);
                rc = wait_message(&e->base, &down, i);
                if (dst)
                        shm_copy(dst, down.slots[i % 2], o->down);
                else if (e->base.o.kind == RAW_SEND)
                        mem_look(down.slots[i % 2], o->down);
                if (round_trips) {
                        t1 = clock_stamp();
                        hist_add(round_trips, clock_stamp_ns(t0, t1));
                        t0 = t1;
                }
        }
        return rc;
}

/* What goes back is what the memory below it holds: bytes like any others. */
static int serve_exchange(struct shm_end *e, const struct raw_order *o)
{
        const struct lane up = lane_of(e, true, o->up), down = lane_of(e, false, o->down);
        int rc;

        clear(&up);
        rc = line_up(e);
        for (uint64_t i = 1; i <= o->n && !rc; i++) {
                rc = wait_message(&e->base, &up, i);
                if (e->base.o.kind == RAW_SEND)
                        mem_look(up.slots[i % 2], o->up);
                if (!rc)
                        put(&down, e->src, i);
        }
        return rc;
}

/* ---- streams ---- */

static unsigned slots_of(const struct raw_order *o)
{
        return o->slots && o->slots < o->depth ? o->slots : o->depth;
}

static inline _Atomic uint64_t *flag_of(unsigned char *slot, size_t size)
{
        return (_Atomic uint64_t *)(void *)(slot + flag_at(size));
}

static int drive_stream(struct shm_end *e, const struct raw_order *o, const void *src)
{
        unsigned slots = slots_of(o), at = 0;
        unsigned char *first = direction(e, true), *end = first + slots * stride_of(o->up), *slot = first;
        uint64_t free_until = slots;
        int rc;

        atomic_store_explicit(&e->area->credit, 0, memory_order_relaxed);
        rc = line_up(e);
        e->base.started_ns = clock_ns();
        for (uint64_t i = 1; i <= o->n && !rc; i++) {
                if (i > free_until) {
                        rc = wait_for(&e->base, &e->area->credit, i - slots);
                        free_until = atomic_load_explicit(&e->area->credit, memory_order_acquire) + slots;
                }
                shm_copy(slot, (const char *)src + at * o->src_stride, o->up);
                at = at + 1 == slots ? 0 : at + 1;
                atomic_store_explicit(flag_of(slot, o->up), i, memory_order_release);
                slot += stride_of(o->up);
                slot = slot == end ? first : slot;
        }
        return rc ? rc : wait_for(&e->base, &e->area->credit, o->n);
}

static int serve_stream(struct shm_end *e, const struct raw_order *o)
{
        unsigned slots = slots_of(o);
        unsigned char *first = direction(e, true), *end = first + slots * stride_of(o->up), *slot = first;
        uint64_t batch = slots > 1 ? slots / 2 : 1, tell = batch;
        int rc;

        for (; slot != end; slot += stride_of(o->up))
                atomic_store_explicit(flag_of(slot, o->up), 0, memory_order_relaxed);
        slot = first;
        rc = line_up(e);
        for (uint64_t i = 1; i <= o->n && !rc; i++) {
                rc = wait_for(&e->base, flag_of(slot, o->up), i);
                if (e->base.o.kind == RAW_SEND)
                        mem_look(slot, o->up);
                if (i == tell || i == o->n) {
                        atomic_store_explicit(&e->area->credit, i, memory_order_release);
                        tell += batch;
                }
                slot += stride_of(o->up);
                slot = slot == end ? first : slot;
        }
        return rc;
}

static int shm_serve(struct raw_end *base, const struct raw_order *o)
{
        struct shm_end *e = end_of(base);

        return o->shape == RAW_STREAM ? serve_stream(e, o) : serve_exchange(e, o);
}

static int shm_drive(struct raw_end *base, const struct raw_order *o, const void *src, void *dst,
                     struct hist *round_trips)
{
        struct shm_end *e = end_of(base);

        return o->shape == RAW_STREAM ? drive_stream(e, o, src) : drive_exchange(e, o, src, dst, round_trips);
}

const struct raw_medium raw_shm_medium = {
    .scheme = "shm",
    .unavailable = shm_unavailable,
    .offer = shm_offer,
    .answer = shm_answer,
    .settle = shm_settle,
    .serve = shm_serve,
    .drive = shm_drive,
    .free = shm_end_free,
};
