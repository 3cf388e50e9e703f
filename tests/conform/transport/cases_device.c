/*
 * Device memory that no processor and no network device can reach: its addresses are mapped without access, its bytes
 * lie elsewhere, and only the passport's operations move them. Those take their time: a copy happens when it is asked
 * about for the last time, not before, so whoever uses the bytes earlier, or gives the buffer away, is found out.
 */
#include "conform.h"

#include <sys/mman.h>
#include <unistd.h>

#define COPIES 64u

struct device {
        unsigned char *fence, *bytes; /* what the passport names; where the bytes are */
        size_t len;
        struct copy {
                unsigned char *to;
                const unsigned char *from;
                size_t len;
                unsigned polls; /* still to come */
        } copies[COPIES];       /* by ticket */
        uint64_t first, next;
        unsigned pinned;
        struct mem_region region;
};

static struct device *device_of(const struct mem_region *r)
{
        return r->owner;
}

static unsigned char *device_at(const struct mem_region *r, size_t off, size_t len)
{
        struct device *d = device_of(r);
        size_t at = (size_t)((unsigned char *)r->addr - d->fence) + off;

        CHECK(off <= r->len && len <= r->len - off && at + len <= d->len);
        return d->bytes + at;
}

static int device_copy(struct device *d, unsigned char *to, const unsigned char *from, size_t len, uint64_t *ticket)
{
        CHECK(d->next - d->first < COPIES);
        *ticket = d->next;
        d->copies[d->next % COPIES] = (struct copy){to, from, len, (unsigned)prng_at(3, 1, d->next) % 50};
        d->next++;
        return 0;
}

static int device_put(const struct mem_region *r, size_t off, const void *src, size_t len, uint64_t *ticket)
{
        return device_copy(device_of(r), device_at(r, off, len), src, len, ticket);
}

static int device_get(const struct mem_region *r, size_t off, void *dst, size_t len, uint64_t *ticket)
{
        return device_copy(device_of(r), dst, device_at(r, off, len), len, ticket);
}

/* In order, as on one queue of a device. */
static int device_test(const struct mem_region *r, uint64_t ticket)
{
        struct device *d = device_of(r);

        CHECK(ticket < d->next);
        while (d->first <= ticket) {
                struct copy *c = &d->copies[d->first % COPIES];

                if (c->polls-- > 0)
                        return 0;
                memcpy(c->to, c->from, c->len);
                d->first++;
        }
        return 1;
}

static int device_flush(const struct mem_region *r)
{
        return 0;
}

static int device_pin(const struct mem_region *r, void *host, size_t len)
{
        device_of(r)->pinned++;
        return 0;
}

static void device_unpin(const struct mem_region *r, void *host, size_t len)
{
        device_of(r)->pinned--;
}

static int device_export(const struct mem_region *r, enum mem_mapping how, int *fd, uint64_t *fd_offset)
{
        return -ENOTSUP;
}

static int device_check(const struct mem_region *r, size_t off, size_t len, uint64_t seed)
{
        return -ENOTSUP;
}

static const struct mem_ops device_ops = {
    .put_async = device_put,
    .get_async = device_get,
    .test = device_test,
    .flush = device_flush,
    .host_register = device_pin,
    .host_unregister = device_unpin,
    .export_dmabuf = device_export,
    .check = device_check,
};

static void device_make(struct device *d, size_t len)
{
        *d = (struct device){.len = len};
        d->fence = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        d->bytes = calloc(1, len);
        CHECK(d->fence != MAP_FAILED && d->bytes);
        d->region = mem_host_region(d->fence, len);
        d->region.kind = MEM_DEVICE;
        d->region.device = 0;
        d->region.ops = &device_ops;
        d->region.owner = d;
}

static void device_free(struct device *d)
{
        CHECK_EQ(d->first, d->next); /* no copy was forgotten */
        CHECK_EQ(d->pinned, 0);
        munmap(d->fence, d->len);
        free(d->bytes);
}

static bool is_rdma(const struct side *s)
{
        return strstr(s->backend->name, "rdma") != NULL;
}

/* ---- device_memory: both ends' memory is a device's; writes, notified writes and reads of all sizes ---- */

#define SLOTS      4u
#define SLOT_BYTES 600000u
#define DEV_BYTES  (SLOTS * SLOT_BYTES + 64)
#define ROUNDS     8u

/* What happens in a round, slot by slot, both sides know. */
struct turn {
        size_t len, off;
        unsigned how; /* 0 from the device, 1 from registered host memory, 2 from any */
        bool imm;
};

static struct turn turn_of(unsigned round, unsigned slot)
{
        uint64_t n = round * SLOTS + slot, bits = prng_at(4, 1, n) % 20;
        struct turn t = {.len = prng_at(4, 2, n) % ((1u << bits) + 1)};

        t.len = t.len > SLOT_BYTES ? SLOT_BYTES : t.len;
        if (prng_at(4, 3, n) % 4 == 0)
                t.len = SLOT_BYTES - prng_at(4, 4, n) % 9;
        t.off = slot * SLOT_BYTES + prng_at(4, 5, n) % (SLOT_BYTES - t.len + 1);
        t.how = (unsigned)(prng_at(4, 6, n) % 3);
        t.imm = prng_at(4, 7, n) % 2;
        return t;
}

struct sides_memory {
        struct device d;
        struct tp_mem *dev, *host;
        struct tp_rmem *r;
};

static void memory_make(struct side *s, struct sides_memory *x)
{
        device_make(&x->d, DEV_BYTES);
        OK(tp_reg(s->ep, &x->d.region, &x->dev));
        CHECK(x->dev->region.addr == x->d.fence);
        if (is_rdma(s) && s->attr.emulated) {
                CHECK(!strcmp(x->dev->path, "staged"));
                CHECK(strstr(x->dev->why, "dmabuf: EOPNOTSUPP") != NULL);
                CHECK(strstr(x->dev->why, "peermem: no nvidia-peermem") != NULL);
        }
        OK(tp_alloc(s->ep, DEV_BYTES, &x->host));
        give_key(s, x->dev, 64, DEV_BYTES - 64);
        take_key(s, &x->r);
}

static void write_turn(struct side *s, struct sides_memory *x, unsigned char *heap, unsigned round, unsigned slot)
{
        struct turn t = turn_of(round, slot);
        unsigned char *at[] = {x->d.fence + t.off, (unsigned char *)x->host->region.addr + t.off, heap + t.off};
        unsigned char *fill = t.how == 0 ? x->d.bytes + t.off : at[t.how];
        struct tp_mem *mem = t.how == 0 ? x->dev : t.how == 1 ? x->host : NULL;
        uint32_t n = round * SLOTS + slot;
        uint64_t deadline = clock_ns() + PATIENCE_NS;

        pattern_fill(fill, t.len, n);
        if (t.imm) {
                uint64_t cookie = begin_post(s);

                while (!end_post(s, cookie, tp_write_imm(s->ep, mem, at[t.how], t.len, x->r, t.off, n, 0, cookie))) {
                        pump(s);
                        CHECK(clock_ns() < deadline);
                }
        } else {
                do_write(s, mem, at[t.how], t.len, x->r, t.off, slot % 2 ? TP_MORE : 0);
                do_send(s, s->ep, &n, sizeof(n), 0);
        }
}

/* Reads back what the round wrote, into the device or the host. */
static void read_turn(struct side *s, struct sides_memory *x, unsigned char *heap, unsigned round, unsigned slot)
{
        struct turn t = turn_of(round, slot);
        unsigned how = (t.how + 1) % 3;

        if (how == 0) {
                memset(x->d.bytes + t.off, 0xee, t.len);
                do_read(s, x->dev, x->d.fence + t.off, t.len, x->r, t.off);
                return;
        }
        do_read(s, how == 1 ? x->host : NULL, (how == 1 ? (unsigned char *)x->host->region.addr : heap) + t.off, t.len,
                x->r, t.off);
}

static void check_turn(struct sides_memory *x, unsigned char *heap, unsigned round, unsigned slot)
{
        struct turn t = turn_of(round, slot);
        unsigned how = (t.how + 1) % 3;
        unsigned char *got = how == 0 ? x->d.bytes : how == 1 ? (unsigned char *)x->host->region.addr : heap;

        CHECK(pattern_ok(got + t.off, t.len, round * SLOTS + slot));
}

static void memory_a(struct side *s)
{
        unsigned char *heap = malloc(DEV_BYTES);
        struct sides_memory x;
        struct tp_event ev;

        CHECK(heap);
        memory_make(s, &x);
        for (unsigned round = 0; round < ROUNDS; round++) {
                for (unsigned i = 0; i < SLOTS; i++)
                        write_turn(s, &x, heap, round, i);
                if (round % 2) /* a read observes the writes posted before it */
                        settle(s);
                for (unsigned i = 0; i < SLOTS; i++)
                        read_turn(s, &x, heap, round, i);
                settle(s);
                for (unsigned i = 0; i < SLOTS; i++)
                        check_turn(&x, heap, round, i);
                next_msg(s, &ev);
                release(s, &ev);
        }
        barrier(s);
        tp_free(x.dev);
        tp_free(x.host);
        device_free(&x.d);
        free(heap);
}

static void memory_b(struct side *s)
{
        struct sides_memory x;

        memory_make(s, &x);
        for (unsigned round = 0; round < ROUNDS; round++) {
                for (unsigned i = 0; i < SLOTS; i++) {
                        struct turn t = turn_of(round, i);
                        uint32_t n = round * SLOTS + i, got;
                        struct tp_event ev;

                        next_event(s, &ev);
                        CHECK_EQ(ev.kind, t.imm ? TP_EV_IMM : TP_EV_MSG);
                        if (t.imm) {
                                CHECK_EQ(ev.imm, n);
                                CHECK_EQ(ev.len, t.len);
                        } else {
                                memcpy(&got, ev.data, sizeof(got));
                                CHECK_EQ(got, n);
                                release(s, &ev);
                        }
                        /* The key opens the memory from its 64th byte on. */
                        CHECK(pattern_ok(x.d.bytes + 64 + t.off, t.len, n));
                }
                do_send(s, s->ep, "next", 4, 0);
        }
        for (unsigned i = 0; i < 64; i++)
                CHECK_EQ(x.d.bytes[i], 0);
        settle(s);
        barrier(s);
        tp_free(x.dev);
        tp_free(x.host);
        device_free(&x.d);
}

/* ---- device_both_ways: both write and read at the same time; what the peer writes survives our own copies ---- */

#define BOTH_OPS   40u
#define BOTH_BYTES 400000u

static void both_side(struct side *s)
{
        struct device d;
        struct tp_mem *mem;
        struct tp_rmem *r;
        uint64_t seen = 0, me = s->is_a;

        /* The first third is what we send, the others what the peer writes by turns: who sends op i has been told that
         * op i - 2 was looked at. All come and go through one passport. */
        device_make(&d, 3 * BOTH_BYTES);
        OK(tp_reg(s->ep, &d.region, &mem));
        give_key(s, mem, 0, 3 * BOTH_BYTES);
        take_key(s, &r);
        for (unsigned i = 0; i < BOTH_OPS || seen < BOTH_OPS;) {
                struct tp_event ev;

                if (i < BOTH_OPS && i <= seen) { /* what we sent last was seen, or we begin */
                        size_t len = 1 + prng_at(5, me, i) % BOTH_BYTES;

                        settle(s);
                        pattern_fill(d.bytes, len, 100 * me + i);
                        do_write(s, mem, d.fence, len, r, (1 + i % 2) * BOTH_BYTES, 0);
                        do_send(s, s->ep, &len, sizeof(len), 0);
                        i++;
                }
                if (next_event_in(s, &ev, i < BOTH_OPS ? 0 : NS_PER_S)) {
                        size_t len;

                        CHECK_EQ(ev.kind, TP_EV_MSG);
                        memcpy(&len, ev.data, sizeof(len));
                        release(s, &ev);
                        CHECK(pattern_ok(d.bytes + (1 + seen % 2) * BOTH_BYTES, len, 100 * !me + seen));
                        seen++;
                }
        }
        settle(s);
        barrier(s);
        tp_free(mem);
        device_free(&d);
}

/* ---- device_forced: a path that is not to be had is refused, with the reason ---- */

static void forced_open(struct side *s, enum tp_gpu_path path)
{
        s->opts.gpu_path = path;
        side_open(s);
        if (s->is_a) {
                side_learn_url(s);
                side_connect(s, &s->ep);
        } else {
                side_listen(s);
                side_accept(s, &s->ep);
        }
        if (!is_rdma(s)) {
                fprintf(stderr, "skipped: no registration of device memory by paths over %s\n", s->backend->name);
                _exit(EXIT_SKIP);
        }
}

static void forced_side(struct side *s)
{
        enum tp_gpu_path path = s->is_a ? TP_GPU_DMABUF : TP_GPU_PEERMEM;
        struct tp_mem *mem;
        struct device d;

        forced_open(s, path);
        device_make(&d, 8192);
        CHECK(tp_reg(s->ep, &d.region, &mem) < 0);
        CHECK(strstr(err_text(), tp_gpu_path_names[path]) != NULL);
        CHECK(strstr(err_text(), s->is_a ? "dmabuf" : "nvidia-peermem") != NULL);
        OK(tp_alloc(s->ep, 8192, &mem)); /* host memory is another matter */
        CHECK(!strcmp(mem->path, "host"));
        device_free(&d);
        barrier(s);
}

/* ---- device_refused: a medium that moves bytes with the processor says so, instead of touching them ---- */

static void refused_side(struct side *s)
{
        struct device d;
        struct tp_mem *mem;

        if (is_rdma(s)) {
                fprintf(stderr, "skipped: %s takes device memory\n", s->backend->name);
                _exit(EXIT_SKIP);
        }
        device_make(&d, 8192);
        CHECK_EQ(tp_reg(s->ep, &d.region, &mem), -ENOTSUP);
        CHECK(strstr(err_text(), "stage device memory through tp_alloc's") != NULL);
        device_free(&d);
        OK(tp_alloc(s->ep, 8192, &mem));
        barrier(s);
}

const struct tcase device_cases[] = {
    {"device_refused", refused_side, refused_side, 0},
    {"device_memory", memory_a, memory_b, 0},
    {"device_both_ways", both_side, both_side, 0},
    {"device_forced", forced_side, forced_side, BARE | NOT_FAULT},
    {NULL, NULL, NULL, 0},
};
