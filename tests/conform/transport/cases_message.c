/* Messages: sizes, order, loans, back-pressure, waiting. */
#include "conform.h"

#include <poll.h>
#include <sched.h>

/* ---- attr ---- */

static void attr_side(struct side *s)
{
        CHECK(s->attr.name && s->attr.name[0]);
        CHECK(s->attr.msg_max >= TP_MSG_MAX_LEAST);
        CHECK(s->attr.rdma_max > 0);
        CHECK(s->attr.tx_depth > 0);
        CHECK(s->attr.driver_copies >= -1);
        CHECK(s->attr.expected_latency_ns > 0 && s->attr.expected_bytes_per_s > 0);
        CHECK(s->ep->peer[0]);
        CHECK(s->ep->ctx == s->ctx);
        barrier(s);
}

/* ---- send_sizes: every size up to 300, then around every power of two, then msg_max itself; both directions ---- */

#define SMALL_SIZES 300u

/* The i-th size, or SIZE_MAX after the last. */
static size_t size_at(size_t i, size_t msg_max)
{
        size_t power, len;

        if (i <= SMALL_SIZES)
                return i;
        i -= SMALL_SIZES + 1;
        power = (size_t)512 << (i / 5);
        len = power - 2 + i % 5;
        if (power <= msg_max)
                return len < msg_max ? len : msg_max;
        return SIZE_MAX;
}

static void send_all_sizes(struct side *s)
{
        unsigned char *buf = malloc(s->attr.msg_max + 1);
        size_t len;

        CHECK(buf);
        for (size_t i = 0; (len = size_at(i, s->attr.msg_max)) != SIZE_MAX; i++) {
                settle(s); /* the buffer is ours again */
                pattern_fill(buf, len, i);
                do_send(s, s->ep, buf, len, 0);
        }
        settle(s);
        REFUSED(tp_send(s->ep, buf, s->attr.msg_max + 1, 0, 0), -EMSGSIZE);
        free(buf);
}

static void receive_all_sizes(struct side *s)
{
        uint64_t bytes = s->ep->n.msg_bytes_rx, n = s->ep->n.msgs_rx;
        struct tp_event ev;
        size_t len;

        for (size_t i = 0; (len = size_at(i, s->attr.msg_max)) != SIZE_MAX; i++) {
                next_msg(s, &ev);
                CHECK_EQ(ev.len, len);
                CHECK(pattern_ok(ev.data, ev.len, i));
                release(s, &ev);
                n++;
                bytes += len;
        }
        CHECK_EQ(s->ep->n.msgs_rx, n);
        CHECK_EQ(s->ep->n.msg_bytes_rx, bytes);
}

static void send_sizes_a(struct side *s)
{
        send_all_sizes(s);
        receive_all_sizes(s);
        barrier(s);
        expect_quiet(s);
        barrier(s);
}

static void send_sizes_b(struct side *s)
{
        receive_all_sizes(s);
        send_all_sizes(s);
        barrier(s);
        expect_quiet(s);
        barrier(s);
}

/* ---- flood: both ends send as fast as they can and check what comes ---- */

#define FLOOD_MSGS 20000u

static void check_numbered(struct side *s, const struct tp_event *ev, uint64_t expected)
{
        uint64_t seq;

        CHECK(ev->kind == TP_EV_MSG);
        CHECK(ev->len >= sizeof(seq));
        memcpy(&seq, ev->data, sizeof(seq));
        CHECK_EQ(seq, expected);
        CHECK(pattern_ok((const char *)ev->data + 8, ev->len - 8, seq));
        release(s, ev);
}

static size_t numbered(unsigned char *buf, uint64_t seq, size_t body)
{
        memcpy(buf, &seq, sizeof(seq));
        pattern_fill(buf + 8, body, seq);
        return body + 8;
}

static void flood_side(struct side *s)
{
        /* One buffer per message that can be outstanding, so that none is filled while the transport still owns it. */
        unsigned depth = s->attr.tx_depth < 4096 ? s->attr.tx_depth : 4096;
        unsigned char(*bufs)[1024] = calloc(depth, sizeof(*bufs));
        uint64_t sent = 0, got = 0, deadline = clock_ns() + PATIENCE_NS;

        CHECK(bufs);
        while (sent < FLOOD_MSGS || got < FLOOD_MSGS) {
                struct tp_event ev;

                if (sent < FLOOD_MSGS && s->open_n == 0) {
                        for (unsigned i = 0; i < depth && sent < FLOOD_MSGS; i++) {
                                size_t len = numbered(bufs[i], sent, prng_below(&s->prng, 1000));
                                uint64_t cookie = begin_post(s);

                                if (!end_post(s, cookie, tp_send(s->ep, bufs[i], len, 0, cookie)))
                                        break;
                                sent++;
                        }
                }
                if (pump(s) == 0)
                        sched_yield();
                while (s->q_n > 0 && next_event_in(s, &ev, 0)) {
                        check_numbered(s, &ev, got++);
                        deadline = clock_ns() + PATIENCE_NS;
                }
                if (clock_ns() > deadline)
                        FAIL("side %c: stuck after %llu sent and %llu received", s->is_a ? 'a' : 'b',
                             (unsigned long long)sent, (unsigned long long)got);
        }
        settle(s);
        barrier(s);
        expect_quiet(s);
        CHECK_EQ(s->ep->n.msgs_tx, FLOOD_MSGS);
        CHECK_EQ(s->ep->n.msgs_rx, FLOOD_MSGS);
        free(bufs);
        barrier(s);
}

/* ---- backpressure: b is deaf; a sends until -EAGAIN stays; then all comes, once, in order ---- */

#define PRESSURE_BODY 1000u

static void backpressure_a(struct side *s)
{
        /* Buffers stay valid for as long as the transport may hold them. */
        const uint64_t cap = 200000, ring = 4096;
        unsigned char *buf = malloc(ring * (PRESSURE_BODY + 8)), last[16];
        uint64_t sent = 0, refused = 0;

        CHECK(buf);
        while (refused < 2000) {
                unsigned char *m = buf + (sent % ring) * (PRESSURE_BODY + 8);
                uint64_t cookie = begin_post(s);
                size_t len;

                CHECK(s->open_n < ring);
                len = numbered(m, sent, PRESSURE_BODY);
                if (end_post(s, cookie, tp_send(s->ep, m, len, 0, cookie))) {
                        refused = 0;
                        sent++;
                        CHECK(sent < cap);
                        continue;
                }
                refused++;
                pump(s);
        }
        CHECK(sent > 0);
        CHECK(s->ep->n.eagain > 0);
        oob_send(s, &sent, sizeof(sent));
        settle(s);
        do_send(s, s->ep, last, numbered(last, sent, 8), 0);
        settle(s);
        barrier(s);
        free(buf);
}

static void backpressure_b(struct side *s)
{
        struct tp_event ev;
        uint64_t n;

        oob_recv_idle(s, &n, sizeof(n));
        for (uint64_t i = 0; i <= n; i++) {
                next_msg(s, &ev);
                check_numbered(s, &ev, i);
        }
        expect_quiet(s);
        barrier(s);
}

/* ---- loans: kept, and given back in random order; the bytes stay until then ---- */

#define LOANS_MSGS 4000u
#define LOANS_HELD 16u
#define LOANS_AGE  32u /* an old loan may block a ring; older than this none is kept while we wait for more */

static void loans_a(struct side *s)
{
        unsigned char *buf = malloc(s->attr.msg_max);

        CHECK(buf);
        for (uint64_t i = 0; i < LOANS_MSGS; i++) {
                size_t body = prng_below(&s->prng, i % 16 ? 200 : 3000);

                settle(s);
                do_send(s, s->ep, buf, numbered(buf, i, body), 0);
        }
        settle(s);
        barrier(s);
        free(buf);
}

static void loans_b(struct side *s)
{
        struct tp_event held[LOANS_HELD];
        uint64_t seq[LOANS_HELD];
        unsigned n = 0;

        for (uint64_t i = 0; i < LOANS_MSGS; i++) {
                next_msg(s, &held[n]);
                seq[n++] = i;
                while (n == LOANS_HELD || (n > 0 && i + 1 == LOANS_MSGS)) {
                        unsigned k = (unsigned)prng_below(&s->prng, n);

                        for (unsigned j = 0; j < n; j++)
                                k = i - seq[j] >= LOANS_AGE ? j : k;
                        check_numbered(s, &held[k], seq[k]);
                        n--;
                        held[k] = held[n];
                        seq[k] = seq[n];
                }
        }
        barrier(s);
}

/* ---- loans_all: b keeps everything until a is refused, then lets go in random order ---- */

static void loans_all_b(struct side *s)
{
        uint64_t total, got = 0;
        struct tp_event *held;
        uint32_t *order;

        oob_recv(s, &total, sizeof(total)); /* pumps: events pile up in our queue, unreleased */
        CHECK(s->q_n > 0 && s->q_n <= total);
        held = malloc(s->q_n * sizeof(*held));
        order = malloc(s->q_n * sizeof(*order));
        CHECK(held && order);
        for (size_t n = s->q_n; got < n; got++) {
                next_msg(s, &held[got]);
                order[got] = (uint32_t)got;
        }
        prng_shuffle(&s->prng, order, got);
        for (size_t i = 0; i < got; i++)
                check_numbered(s, &held[order[i]], order[i]);
        for (; got < total; got++) {
                struct tp_event ev;

                next_msg(s, &ev);
                check_numbered(s, &ev, got);
        }
        barrier(s);
        free(held);
        free(order);
}

static void loans_all_a(struct side *s)
{
        const uint64_t cap = 200000, ring = 8192, slot = 512;
        unsigned char *pool = malloc(ring * slot);
        uint64_t sent = 0, quiet_since = clock_ns();

        CHECK(pool);
        /* Refused for 50 ms while b polls all the time: b's loans are what fills it. */
        while (clock_ns() - quiet_since < 50 * NS_PER_MS) {
                unsigned char *m = pool + (sent % ring) * slot;
                uint64_t cookie = begin_post(s);
                size_t len;

                CHECK(s->open_n < ring);
                len = numbered(m, sent, 400);
                if (end_post(s, cookie, tp_send(s->ep, m, len, 0, cookie))) {
                        quiet_since = clock_ns();
                        sent++;
                        CHECK(sent < cap);
                }
                pump(s);
        }
        oob_send(s, &sent, sizeof(sent));
        settle(s);
        barrier(s);
        free(pool);
}

/* ---- more: held-back posts keep their order and are let go by the next post or poll ---- */

static void more_a(struct side *s)
{
        unsigned char buf[64];

        for (uint64_t i = 0; i < 2000; i++) {
                settle(s);
                do_send(s, s->ep, buf, numbered(buf, i, 40), i % 7 ? TP_MORE : 0);
        }
        settle(s);
        do_send(s, s->ep, buf, numbered(buf, 2000, 40), TP_MORE);
        pump(s);
        settle(s);
        barrier(s);
}

static void more_b(struct side *s)
{
        struct tp_event ev;

        for (uint64_t i = 0; i <= 2000; i++) {
                next_msg(s, &ev);
                check_numbered(s, &ev, i);
        }
        barrier(s);
}

/* ---- sleeping: contexts that sleep at once play ping-pong; a wake-up that is lost costs half a second ---- */

#define NAP_ROUNDS 300u

static void ping(struct side *s, uint64_t seq)
{
        unsigned char buf[64];

        clock_spin_until(clock_ns() + prng_below(&s->prng, 60000));
        do_send(s, s->ep, buf, numbered(buf, seq, 32), 0);
        settle(s);
}

static void sleep_side(struct side *s)
{
        unsigned slow = 0;

        for (uint64_t i = 0; i < NAP_ROUNDS; i++) {
                uint64_t t0 = clock_ns();
                struct tp_event ev;

                if (s->is_a)
                        ping(s, i);
                next_msg(s, &ev);
                check_numbered(s, &ev, i);
                if (!s->is_a)
                        ping(s, i);
                slow += clock_ns() - t0 > 450 * NS_PER_MS;
        }
        if (slow > 3)
                FAIL("side %c: %u of %u waits took more than 450 ms", s->is_a ? 'a' : 'b', slow, NAP_ROUNDS);
        CHECK(s->ep->n.naps > 0);
        barrier(s);
}

static void wait_deadline_side(struct side *s)
{
        uint64_t t0 = clock_ns(), took;
        struct tp_event ev;

        CHECK_EQ(tp_wait(s->ctx, &ev, 1, t0 + 50 * NS_PER_MS), 0);
        took = clock_ns() - t0;
        CHECK(took >= 50 * NS_PER_MS && took < 5 * NS_PER_S);
        CHECK_EQ(tp_wait(s->ctx, &ev, 1, 0), 0);
        barrier(s);
}

/* ---- own_poll_set: arm and poll(2) on tp_fd by hand ---- */

static void own_poll_set_a(struct side *s)
{
        struct pollfd p = {.fd = tp_fd(s->ctx), .events = POLLIN};
        struct tp_event ev;
        int rc;

        for (uint64_t i = 0; i < 50; i++) {
                while ((rc = tp_arm(s->ctx)) == -EAGAIN)
                        pump(s);
                OK(rc);
                if (s->q_n == 0) {
                        char go = 'g';

                        oob_send(s, &go, 1);
                        CHECK_EQ(poll(&p, 1, 20000), 1);
                }
                tp_disarm(s->ctx);
                next_msg(s, &ev);
                check_numbered(s, &ev, i);
        }
        barrier(s);
        next_msg(s, &ev); /* b has sent; but it may still travel, so that arm may well succeed until it is here */
        release(s, &ev);
        barrier(s);
}

static void own_poll_set_b(struct side *s)
{
        unsigned char buf[64];
        char go;

        for (uint64_t i = 0; i < 50; i++) {
                oob_recv(s, &go, 1);
                settle(s);
                do_send(s, s->ep, buf, numbered(buf, i, 32), 0);
        }
        settle(s);
        do_send(s, s->ep, buf, 8, 0);
        settle(s);
        barrier(s);
        barrier(s);
}

const struct tcase message_cases[] = {
    {"attr", attr_side, attr_side, 0},
    {"send_sizes", send_sizes_a, send_sizes_b, 0},
    {"flood_both", flood_side, flood_side, 0},
    {"backpressure", backpressure_a, backpressure_b, 0},
    {"loans_random", loans_a, loans_b, 0},
    {"loans_all", loans_all_a, loans_all_b, 0},
    {"more_order", more_a, more_b, 0},
    {"sleeping", sleep_side, sleep_side, SLEEPY},
    {"wait_deadline", wait_deadline_side, wait_deadline_side, 0},
    {"own_poll_set", own_poll_set_a, own_poll_set_b, NOT_FAULT},
    {NULL, NULL, NULL, 0},
};
