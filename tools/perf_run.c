/*
 * perf: the tests. Each is two functions that run against each other, one at either end.
 *
 *   lat   one transfer there, one back; half the time of the round. A write is announced by a message in the same
 *         system call (that is how writes are used); a read is one operation, whole.
 *   bw    transfers in a window; the clock stops when the receiver has confirmed the last one. Unless checked, writes
 *         are confirmed once, at the end, by a message that cannot overtake them.
 *   rate  bw that lets the transport send several messages in one go.
 */
#include <errno.h>
#include <string.h>
#include <time.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"
#include "prng.h"
#include "raw.h"

#define PEER_STREAM 0x9e3779b9u /* what the peer sends is another pattern than what the driver sends */
#define BURST       16u         /* rate: messages in one go at most */
#define WARM_SHARE  10          /* warm-up takes that part of the time of a repeat */
#define N_MAX       100000000u

const char *const perf_test_names[] = {"lat", "bw", "rate", NULL};
const char *const perf_op_names[] = {"auto", "send", "write", "write_imm", "read", NULL};

struct run {
        struct perf_link *l;
        enum perf_test test;
        enum perf_op op;
        uint64_t size, stride, n, seed;
        unsigned window, slots;
        bool verify, driver;
        uint64_t wrong, seen, ns;
        struct hist *hist;
        uint64_t notes[PERF_DEPTH_MAX]; /* what is announced must stay where it is until it has gone */
};

/* ---- sizes ---- */

static uint64_t stride_of(uint64_t size)
{
        return ALIGN_UP(size ? size : 1, (uint64_t)CACHE_LINE);
}

static unsigned slots_of(uint64_t size, uint64_t depth)
{
        uint64_t fit = PERF_SLOTS_BYTES / stride_of(size);

        fit = fit ? fit : 1;
        return (unsigned)(fit < depth ? fit : depth);
}

uint64_t perf_region_bytes(const struct perf_opts *o)
{
        uint64_t most = 4096;

        for (size_t i = 0; i < o->n_sizes; i++) {
                uint64_t bytes = stride_of(o->sizes[i]) * slots_of(o->sizes[i], (uint64_t)o->depth);

                most = bytes > most ? bytes : most;
        }
        return most;
}

enum perf_op perf_op_for(const struct perf_opts *o, const struct tp_attr *attr, uint64_t size)
{
        if (o->op != PERF_AUTO)
                return (enum perf_op)o->op;
        return size <= attr->msg_max ? PERF_SEND : PERF_WRITE;
}

/* ---- data that says what it is: of which run, which transfer, which position ---- */

static uint64_t stream_of(const struct run *r, bool from_driver, uint64_t seq)
{
        return r->seed ^ (from_driver ? 0 : PEER_STREAM) ^ (seq << 20);
}

static void fill(const struct run *r, uint8_t *p, bool from_driver, uint64_t seq)
{
        uint64_t stream = stream_of(r, from_driver, seq);

        for (uint64_t i = 0; i < r->size; i += 8) {
                uint64_t v = prng_at(stream, seq, i);

                memcpy(p + i, &v, r->size - i < 8 ? r->size - i : 8);
        }
}

static bool holds(const struct run *r, const uint8_t *p, bool from_driver, uint64_t seq)
{
        uint64_t stream = stream_of(r, from_driver, seq);

        for (uint64_t i = 0; i < r->size; i += 8) {
                uint64_t v = prng_at(stream, seq, i);

                if (memcmp(p + i, &v, r->size - i < 8 ? r->size - i : 8))
                        return false;
        }
        return true;
}

/* ---- one transfer ---- */

static uint64_t slot_at(const struct run *r, uint64_t seq)
{
        return seq % r->slots * r->stride;
}

static int note(struct run *r, uint64_t value, unsigned flags)
{
        uint64_t *at = &r->notes[value % PERF_DEPTH_MAX];

        *at = value;
        return perf_send(r->l, at, sizeof(*at), flags);
}

static int put_send(struct run *r, uint64_t seq, unsigned flags)
{
        return perf_send(r->l, r->l->tx + slot_at(r, seq), r->size, flags);
}

static int put_write(struct run *r, uint64_t seq, unsigned flags)
{
        int rc = perf_write(r->l, r->l->tx + slot_at(r, seq), r->size, slot_at(r, seq), TP_MORE);

        return rc < 0 ? rc : note(r, seq, flags);
}

static int put_write_imm(struct run *r, uint64_t seq, unsigned flags)
{
        return perf_write_imm(r->l, r->l->tx + slot_at(r, seq), r->size, slot_at(r, seq), (uint32_t)seq);
}

static int (*const put_op[PERF_OPS])(struct run *, uint64_t, unsigned) = {
    [PERF_SEND] = put_send, [PERF_WRITE] = put_write, [PERF_WRITE_IMM] = put_write_imm};

static int put(struct run *r, uint64_t seq, unsigned flags)
{
        if (r->verify)
                fill(r, r->l->tx + slot_at(r, seq), r->driver, seq);
        return put_op[r->op](r, seq, flags);
}

static int unexpected(const struct run *r, const struct tp_event *ev)
{
        return err_set(-EPROTO, "%s: %s of %zu bytes, which is not what was agreed", r->l->phase,
                       ev->kind == TP_EV_IMM ? "an immediate" : "a message", ev->len);
}

static bool is_note(const struct tp_event *ev, uint64_t *value)
{
        if (ev->kind != TP_EV_MSG || ev->len != sizeof(*value))
                return false;
        memcpy(value, ev->data, sizeof(*value));
        return true;
}

/* Receives transfer seq from the other end and looks at it. */
static int get(struct run *r, uint64_t seq)
{
        const uint8_t *data = r->l->rx + slot_at(r, seq);
        struct tp_event ev;
        uint64_t value;
        bool right;
        int rc = perf_next(r->l, &ev);

        if (rc < 0)
                return rc;
        switch (r->op) {
        case PERF_SEND:
                right = ev.kind == TP_EV_MSG && ev.len == r->size;
                data = ev.data;
                break;
        case PERF_WRITE:
                right = is_note(&ev, &value) && value == seq;
                break;
        default:
                right = ev.kind == TP_EV_IMM && ev.len == r->size && ev.imm == (uint32_t)seq;
                break;
        }
        if (right && r->verify && !holds(r, data, !r->driver, seq))
                r->wrong++;
        perf_release(r->l, &ev);
        r->seen++;
        return right ? 0 : unexpected(r, &ev);
}

static int get_note(struct run *r, uint64_t *value)
{
        struct tp_event ev;
        int rc = perf_next(r->l, &ev);

        if (rc < 0)
                return rc;
        if (!is_note(&ev, value))
                rc = unexpected(r, &ev);
        perf_release(r->l, &ev);
        return rc;
}

/* ---- lat ---- */

static int lat_drive(struct run *r)
{
        int rc = 0;

        for (uint64_t i = 0; i < r->n && !rc; i++) {
                uint64_t t0 = clock_ns();

                rc = put(r, i, 0);
                rc = rc ? rc : get(r, i);
                hist_add(r->hist, (clock_ns() - t0) / 2);
                rc = rc ? rc : perf_drain(r->l, 0);
        }
        return rc;
}

static int lat_serve(struct run *r)
{
        int rc = 0;

        for (uint64_t i = 0; i < r->n && !rc; i++) {
                rc = get(r, i);
                rc = rc ? rc : put(r, i, 0);
                rc = rc ? rc : perf_drain(r->l, 0);
        }
        return rc;
}

/* ---- bw, rate ---- */

static unsigned flags_at(const struct run *r, uint64_t i)
{
        uint64_t burst = r->window / 2 < BURST ? r->window / 2 : BURST;

        return r->test == PERF_RATE && burst && i % burst != burst - 1 && i + 1 < r->n ? TP_MORE : 0;
}

static int stream_drive(struct run *r)
{
        uint64_t confirmed = 0;
        int rc = 0;

        for (uint64_t i = 0; i < r->n && !rc; i++) {
                while (!rc && i - confirmed >= r->window)
                        rc = get_note(r, &confirmed);
                rc = rc ? rc : put(r, i, flags_at(r, i));
        }
        while (!rc && confirmed < r->n)
                rc = get_note(r, &confirmed);
        return rc ? rc : perf_drain(r->l, 0);
}

static int stream_serve(struct run *r)
{
        uint64_t step = r->window > 1 ? r->window / 2 : 1;
        int rc = 0;

        for (uint64_t i = 0; i < r->n && !rc; i++) {
                rc = get(r, i);
                if (!rc && ((i + 1) % step == 0 || i + 1 == r->n))
                        rc = note(r, i + 1, 0);
        }
        return rc ? rc : perf_drain(r->l, 0);
}

/* Writes that nobody looks at one by one. */
static int blind_drive(struct run *r)
{
        uint64_t confirmed;
        int rc = 0;

        for (uint64_t i = 0; i < r->n && !rc; i++) {
                rc = perf_drain(r->l, r->window - 1);
                rc = rc ? rc : perf_write(r->l, r->l->tx + slot_at(r, i), r->size, slot_at(r, i), flags_at(r, i));
        }
        rc = rc ? rc : note(r, r->n, 0);
        rc = rc ? rc : get_note(r, &confirmed);
        return rc ? rc : perf_drain(r->l, 0);
}

static int end_serve(struct run *r)
{
        uint64_t n;
        int rc = get_note(r, &n);

        r->seen = n;
        rc = rc ? rc : note(r, n, 0);
        return rc ? rc : perf_drain(r->l, 0);
}

/* ---- read: the peer does nothing but be there ---- */

static int read_drive(struct run *r)
{
        unsigned window = r->test == PERF_LAT || r->verify ? 1 : r->window;
        uint64_t confirmed;
        int rc = 0;

        for (uint64_t i = 0; i < r->n && !rc; i++) {
                uint8_t *dst = r->l->tx + slot_at(r, i);
                uint64_t t0 = clock_ns();

                rc = perf_read(r->l, dst, r->size, slot_at(r, i));
                rc = rc ? rc : perf_drain(r->l, window - 1);
                if (r->test == PERF_LAT)
                        hist_add(r->hist, clock_ns() - t0);
                if (!rc && r->verify && !holds(r, dst, false, i % r->slots))
                        r->wrong++;
        }
        rc = rc ? rc : perf_drain(r->l, 0);
        rc = rc ? rc : note(r, r->n, 0);
        return rc ? rc : get_note(r, &confirmed);
}

/* ---- a case ---- */

struct flow {
        int (*drive)(struct run *);
        int (*serve)(struct run *);
};

static struct flow flow_of(const struct run *r)
{
        if (r->op == PERF_READ)
                return (struct flow){read_drive, end_serve};
        if (r->test == PERF_LAT)
                return (struct flow){lat_drive, lat_serve};
        if (r->op == PERF_WRITE && !r->verify)
                return (struct flow){blind_drive, end_serve};
        return (struct flow){stream_drive, stream_serve};
}

static uint64_t thread_cpu_ns(void)
{
        struct timespec ts;

        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
        return (uint64_t)ts.tv_sec * NS_PER_S + (uint64_t)ts.tv_nsec;
}

/* One case from the first byte to the peer's account of it. */
static int drive(struct run *r, struct perf_ctl *done, uint64_t *cpu_ns)
{
        struct perf_ctl c = {.kind = PERF_CASE}, ready;
        uint64_t t0, cpu;
        int rc;

        c.f[PF_TEST] = r->test;
        c.f[PF_OP] = r->op;
        c.f[PF_SIZE] = r->size;
        c.f[PF_N] = r->n;
        c.f[PF_WINDOW] = r->window;
        c.f[PF_SLOTS] = r->slots;
        c.f[PF_SEED] = r->seed;
        c.f[PF_VERIFY] = r->verify;
        r->l->phase = "starting a case";
        if ((rc = perf_tell(r->l, &c)) < 0 || (rc = perf_hear(r->l, PERF_READY, false, &ready)) < 0)
                return rc;
        r->l->phase = "measuring";
        cpu = thread_cpu_ns();
        t0 = clock_ns();
        rc = flow_of(r).drive(r);
        r->ns = clock_ns() - t0;
        *cpu_ns = thread_cpu_ns() - cpu;
        r->l->phase = "ending a case";
        return rc < 0 ? rc : perf_hear(r->l, PERF_DONE, false, done);
}

static int check_case(const struct perf_link *l, const struct run *r)
{
        if (r->test >= PERF_TESTS || r->op == PERF_AUTO || r->op >= PERF_OPS || r->window == 0 ||
            r->window > PERF_DEPTH_MAX || r->slots == 0 || r->slots > PERF_DEPTH_MAX || r->size > l->region ||
            r->stride * r->slots > l->region)
                return err_set(-EPROTO, "%s asks for a case that is out of bounds", l->ep->peer);
        return 0;
}

static int serve_one(struct perf_link *l, const struct perf_ctl *c)
{
        struct run r = {
            .l = l,
            .test = (enum perf_test)c->f[PF_TEST],
            .op = (enum perf_op)c->f[PF_OP],
            .size = c->f[PF_SIZE],
            .n = c->f[PF_N],
            .window = (unsigned)c->f[PF_WINDOW],
            .slots = (unsigned)c->f[PF_SLOTS],
            .seed = c->f[PF_SEED],
            .verify = c->f[PF_VERIFY] != 0,
        };
        struct perf_ctl ready = {.kind = PERF_READY}, done = {.kind = PERF_DONE};
        uint64_t cpu, copied = l->ep->n.bytes_copied;
        int rc;

        r.stride = stride_of(r.size < l->region ? r.size : l->region);
        if ((rc = check_case(l, &r)) < 0)
                return rc;
        if (r.op == PERF_READ && r.verify)
                for (unsigned i = 0; i < r.slots; i++)
                        fill(&r, l->rx + slot_at(&r, i), false, i);
        l->phase = "serving a case";
        if ((rc = perf_tell(l, &ready)) < 0)
                return rc;
        cpu = thread_cpu_ns();
        rc = flow_of(&r).serve(&r);
        if (rc < 0)
                return rc;
        done.f[PF_SEEN] = r.seen;
        done.f[PF_WRONG] = r.wrong;
        done.f[PF_CPU_NS] = thread_cpu_ns() - cpu;
        done.f[PF_COPIED] = l->ep->n.bytes_copied - copied;
        return perf_tell(l, &done);
}

int perf_serve_cases(struct perf_link *l)
{
        for (;;) {
                struct perf_ctl c;
                int rc;

                l->phase = "waiting for the next case";
                rc = perf_hear(l, PERF_CASE, true, &c);
                if (rc < 0)
                        return rc;
                if (c.kind == PERF_BYE)
                        return 0;
                rc = serve_one(l, &c);
                if (rc < 0)
                        return rc;
        }
}

/* ---- repeats ---- */

static uint64_t n_for(uint64_t n, uint64_t took_ns, uint64_t want_ns)
{
        double fit = (double)n * (double)want_ns / (double)(took_ns ? took_ns : 1);

        return fit < 1 ? 1 : fit > N_MAX ? N_MAX : (uint64_t)fit;
}

/* Anything that runs n transfers and says how long that took. */
typedef int (*timed_fn)(void *what, uint64_t n, uint64_t *ns);

/* Warms up and finds out how many transfers a repeat is. */
static int warm_up(const struct perf_opts *o, timed_fn run, void *what, uint64_t *n)
{
        uint64_t want = o->duration_ns / WARM_SHARE, took, warm = o->warmup > 0 ? (uint64_t)o->warmup : 8;
        int rc = 0;

        *n = (uint64_t)o->iters;
        if (o->warmup == 0 && o->iters)
                return 0;
        for (;;) {
                rc = run(what, warm, &took);
                if (rc < 0 || o->warmup > 0 || o->iters || took >= want / 2)
                        break;
                warm = took * 8 < want ? warm * 4 : n_for(warm, took, want);
        }
        if (!*n)
                *n = n_for(warm, took, o->duration_ns);
        return rc;
}

static void account(struct perf_row *row, const struct hist *h, uint64_t n, uint64_t ns)
{
        row->iterations += n;
        row->bytes += n * row->size;
        row->total_ns += ns;
        if (row->test == PERF_LAT)
                hist_merge(&row->hist, h);
        if (row->replicates < PERF_REPEATS_MAX)
                row->replicate[row->replicates++] =
                    row->test == PERF_LAT ? hist_percentile(h, h->n < 20 ? 0 : 50) : (double)n * 1e9 / (double)ns;
}

struct link_run {
        struct run r;
        struct hist hist;
        struct perf_ctl done;
        uint64_t cpu_ns, copied;
};

static int link_timed(void *what, uint64_t n, uint64_t *ns)
{
        struct link_run *x = what;
        uint64_t copied = x->r.l->ep->n.bytes_copied;
        int rc;

        hist_reset(&x->hist);
        x->r.hist = &x->hist;
        x->r.n = n;
        x->r.wrong = x->r.seen = 0;
        rc = drive(&x->r, &x->done, &x->cpu_ns);
        x->copied = x->r.l->ep->n.bytes_copied - copied;
        *ns = x->r.ns;
        return rc;
}

int perf_run_case(struct perf_link *l, const struct perf_opts *o, struct perf_row *row, uint64_t seed)
{
        static struct link_run x;
        uint64_t n, ns;
        int rc;

        x.r = (struct run){.l = l,
                           .test = row->test,
                           .op = row->op,
                           .size = row->size,
                           .stride = stride_of(row->size),
                           .seed = seed,
                           .verify = o->verify,
                           .driver = true,
                           .slots = row->test == PERF_LAT ? 1 : slots_of(row->size, (uint64_t)o->depth),
                           .window = row->test == PERF_LAT ? 1 : (unsigned)o->depth};
        if (o->verify && x.r.window > x.r.slots)
                x.r.window = x.r.slots;
        row->slots = x.r.slots;
        row->window = x.r.window;
        if ((rc = warm_up(o, link_timed, &x, &n)) < 0 || (rc = link_timed(&x, n, &ns)) < 0)
                return rc;
        account(row, &x.hist, n, ns);
        row->wrong += x.r.wrong + x.done.f[PF_WRONG];
        row->bytes_copied += x.copied + x.done.f[PF_COPIED];
        row->cpu_local_ns += x.cpu_ns;
        row->cpu_peer_ns += x.done.f[PF_CPU_NS];
        if (x.r.op != PERF_READ && x.done.f[PF_SEEN] != n)
                return err_set(-EPROTO, "the peer saw %llu of %llu transfers", (unsigned long long)x.done.f[PF_SEEN],
                               (unsigned long long)n);
        return 0;
}

struct raw_run {
        struct raw_pair *raw;
        const struct perf_row *row;
        const uint8_t *src;
        struct hist hist;
};

static int raw_timed(void *what, uint64_t n, uint64_t *ns)
{
        struct raw_run *x = what;
        int64_t t;

        hist_reset(&x->hist);
        *ns = 0;
        if (x->row->test != PERF_LAT) {
                t = raw_stream(x->raw, x->src, x->row->size, n, x->row->window);
                *ns = t > 0 ? (uint64_t)t : 0;
                return t < 0 ? (int)t : 0;
        }
        for (uint64_t i = 0; i < n; i++) {
                if (perf_stopped)
                        return err_set(-EINTR, "measuring the bare medium: ended by a signal");
                t = raw_exchange(x->raw, x->src, x->row->size, NULL, x->row->size);
                if (t < 0)
                        return (int)t;
                hist_add(&x->hist, (uint64_t)t / 2);
                *ns += (uint64_t)t;
        }
        return 0;
}

int perf_run_raw(struct raw_pair *raw, const struct perf_opts *o, const uint8_t *src, struct perf_row *row)
{
        static struct raw_run x;
        uint64_t n, ns;
        int rc;

        x.raw = raw;
        x.row = row;
        x.src = src;
        if ((rc = warm_up(o, raw_timed, &x, &n)) < 0 || (rc = raw_timed(&x, n, &ns)) < 0)
                return rc;
        account(row, &x.hist, n, ns);
        return 0;
}
