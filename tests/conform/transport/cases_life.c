/* Beginning and end of connections. */
#include "conform.h"

#include <sched.h>
#include <signal.h>
#include <unistd.h>

/* ---- many_endpoints ---- */

#define MANY 100u

static void echo(struct side *s, struct tp_ep *ep, uint64_t id)
{
        unsigned char buf[16];

        memcpy(buf, &id, 8);
        memset(buf + 8, (int)id, 8);
        do_send(s, ep, buf, sizeof(buf), 0);
        settle(s);
}

static uint64_t echoed(struct side *s, struct tp_ep **from)
{
        struct tp_event ev;
        uint64_t id;

        next_msg(s, &ev);
        CHECK_EQ(ev.len, 16);
        memcpy(&id, ev.data, 8);
        *from = ev.ep;
        release(s, &ev);
        return id;
}

/* Each endpoint says its number and hears it again from the same endpoint. */
static void many_round_a(struct side *s, struct tp_ep **eps, unsigned step)
{
        unsigned n = 0;

        for (unsigned i = 0; i < MANY; i += step, n++)
                echo(s, eps[i], i);
        while (n-- > 0) {
                struct tp_ep *from;
                uint64_t id = echoed(s, &from);

                CHECK(id < MANY && eps[id] == from);
        }
}

static void many_a(struct side *s)
{
        struct tp_ep *eps[MANY];

        side_open(s);
        side_learn_url(s);
        for (unsigned i = 0; i < MANY; i++)
                side_connect(s, &eps[i]);
        for (unsigned i = 0; i < 5; i++)
                many_round_a(s, eps, 1);
        for (unsigned i = 1; i < MANY; i += 2)
                tp_ep_close(eps[i]);
        for (unsigned i = 0; i < 5; i++)
                many_round_a(s, eps, 2);
        barrier(s);
}

static void many_b(struct side *s)
{
        unsigned echoes = 0, downs = 0;
        struct tp_event ev;

        side_open(s);
        side_listen(s);
        for (unsigned i = 0; i < MANY; i++)
                side_accept(s, &s->ep);
        while (echoes < 5 * MANY + 5 * MANY / 2 || downs < MANY / 2) {
                uint64_t id;

                next_event(s, &ev);
                if (ev.kind == TP_EV_DOWN) {
                        downs++;
                        tp_ep_close(ev.ep);
                        continue;
                }
                CHECK_EQ(ev.kind, TP_EV_MSG);
                memcpy(&id, ev.data, 8);
                release(s, &ev);
                echo(s, ev.ep, id);
                echoes++;
        }
        barrier(s);
}

/* ---- awake_then_asleep: a context that polls for long, then sleeps, with more and with fewer endpoints ---- */

#define SPELLS      6u
#define SPELL_POLLS 1000u
#define SPELL_MOST  4u

static const unsigned spell_eps[SPELLS] = {1, 2, SPELL_MOST, 2, 1, 1};

/* One message from each of the n endpoints, in any order, when the other side hears that it is time. */
static void hear_each(struct side *s, struct tp_ep **eps, unsigned n, bool asleep)
{
        uint64_t seen = 0, until = clock_ns() + PATIENCE_NS;
        char go = 'g';

        oob_send(s, &go, 1);
        while (!asleep && s->q_n < n && clock_ns() < until)
                pump(s);
        CHECK(asleep || s->q_n == n);
        for (unsigned i = 0; i < n; i++) {
                struct tp_ep *from;
                uint64_t id = echoed(s, &from);

                CHECK(id < n && eps[id] == from && !(seen & 1ull << id));
                seen |= 1ull << id;
        }
}

static void poll_long(struct side *s)
{
        for (unsigned i = 0; i < SPELL_POLLS; i++)
                CHECK_EQ(pump(s), 0);
}

static void awake_a(struct side *s)
{
        struct tp_ep *eps[SPELL_MOST];
        unsigned have = 0, slow = 0;
        uint64_t t0;

        side_open(s);
        side_learn_url(s);
        for (unsigned i = 0; i < SPELLS; i++) {
                for (; have < spell_eps[i]; have++)
                        side_connect(s, &eps[have]);
                barrier(s);
                while (have > spell_eps[i])
                        tp_ep_close(eps[--have]);
                barrier(s);
                hear_each(s, eps, have, false);
                poll_long(s);
                t0 = clock_ns();
                hear_each(s, eps, have, true);
                slow += clock_ns() - t0 > 450 * NS_PER_MS;
                poll_long(s);
        }
        if (slow > SPELLS / 2)
                FAIL("%u of %u sleeps took more than 450 ms", slow, SPELLS);
        barrier(s);
}

static void awake_b(struct side *s)
{
        struct tp_ep *eps[SPELL_MOST];
        struct tp_event ev;
        unsigned have = 0;
        char go;

        side_open(s);
        side_listen(s);
        for (unsigned i = 0; i < SPELLS; i++) {
                for (; have < spell_eps[i]; have++)
                        side_accept(s, &eps[have]);
                barrier(s);
                for (; have > spell_eps[i]; have--) {
                        unsigned k = spell_eps[i];

                        next_event(s, &ev);
                        while (k + 1 < have && eps[k] != ev.ep)
                                k++;
                        CHECK(ev.kind == TP_EV_DOWN && ev.ep == eps[k]);
                        tp_ep_close(ev.ep);
                        eps[k] = eps[have - 1];
                }
                barrier(s);
                for (unsigned n = 0; n < 2 * have; n++) {
                        if (n % have == 0) {
                                oob_recv_idle(s, &go, 1);
                                clock_spin_until(clock_ns() + prng_below(&s->prng, 200000));
                        }
                        echo(s, eps[n % have], n % have);
                }
        }
        barrier(s);
}

/* ---- connect_nothing, connect_deadline, listen_twice, listener_url ---- */

static void nothing_a(struct side *s)
{
        uint64_t t0 = clock_ns();
        int rc;

        side_open(s);
        side_learn_url(s); /* of a listener that b has closed again */
        rc = tp_connect(s->ctx, s->url, t0 + PATIENCE_NS, &s->ep);
        CHECK_EQ(rc, -ECONNREFUSED);
        CHECK(err_text()[0]);
        CHECK(clock_ns() - t0 < 10 * NS_PER_S);
        barrier(s);
}

static void nothing_b(struct side *s)
{
        side_open(s);
        OK(tp_listen(s->ctx, s->url, &s->listener));
        strcpy(s->url, s->listener->url);
        tp_listener_close(s->listener);
        oob_send(s, s->url, TP_URL_MAX);
        barrier(s);
}

/* b listens and never polls. A medium whose listener answers by itself connects at first; every attempt ends in time. */
static void deadline_a(struct side *s)
{
        char done = 'd';

        side_open(s);
        side_learn_url(s);
        for (unsigned i = 0; i < 300; i++) {
                uint64_t t0 = clock_ns();
                struct tp_ep *ep;
                int rc = tp_connect(s->ctx, s->url, t0 + 50 * NS_PER_MS, &ep);

                CHECK(clock_ns() - t0 < 5 * NS_PER_S);
                if (rc == 0)
                        continue;
                CHECK_EQ(rc, -ETIMEDOUT);
                CHECK(err_text()[0]);
                break;
        }
        oob_send(s, &done, 1);
}

static void deadline_b(struct side *s)
{
        char done;

        side_open(s);
        side_listen(s);
        oob_recv_idle(s, &done, 1);
}

static void listen_twice_a(struct side *s)
{
        struct tp_listener *l;

        side_open(s);
        side_learn_url(s);
        CHECK_EQ(tp_listen(s->ctx, s->url, &l), -EADDRINUSE);
        CHECK(err_text()[0]);
        barrier(s);
}

static void listen_twice_b(struct side *s)
{
        side_open(s);
        side_listen(s);
        barrier(s);
}

static void port_zero_a(struct side *s)
{
        struct tp_url u;

        OK(tp_url_parse(s->url, &u));
        CHECK(u.port[0] && atoi(u.port) > 0);
        barrier(s);
}

static void port_zero_b(struct side *s)
{
        barrier(s);
}

/* ---- ends: graceful, by death, with posts outstanding ---- */

#define LAST_WORDS 10u

static void last_words(struct side *s)
{
        for (uint64_t i = 0; i < LAST_WORDS; i++)
                do_send(s, s->ep, &i, sizeof(i), 0);
        settle(s);
}

static void expect_last_words(struct side *s)
{
        for (uint64_t i = 0; i < LAST_WORDS; i++) {
                struct tp_event ev;
                uint64_t seq;

                next_msg(s, &ev);
                memcpy(&seq, ev.data, sizeof(seq));
                CHECK_EQ(seq, i);
                release(s, &ev);
        }
}

static void expect_down(struct side *s, uint64_t within_ns)
{
        struct tp_event ev;

        if (!next_event_in(s, &ev, within_ns))
                FAIL("no TP_EV_DOWN within %llu ms", (unsigned long long)(within_ns / NS_PER_MS));
        CHECK_EQ(ev.kind, TP_EV_DOWN);
        CHECK(ev.ep == s->ep);
        CHECK(ev.status <= 0);
        CHECK(err_text()[0]);
        CHECK_EQ(s->open_n, 0);
        REFUSED(tp_send(s->ep, "x", 1, 0, 0), -ENOTCONN);
        expect_quiet(s);
}

static void close_a(struct side *s)
{
        expect_last_words(s);
        expect_down(s, PATIENCE_NS);
        tp_ep_close(s->ep);
        expect_quiet(s);
        barrier(s);
}

static void close_b(struct side *s)
{
        last_words(s);
        tp_ep_close(s->ep);
        barrier(s);
}

/* b closes while a still holds loans: they stay readable until a closes. */
static void close_with_loans_a(struct side *s)
{
        struct tp_event ev[LAST_WORDS];

        for (unsigned i = 0; i < LAST_WORDS; i++)
                next_msg(s, &ev[i]);
        expect_down(s, PATIENCE_NS);
        for (uint64_t i = 0; i < LAST_WORDS; i++) {
                CHECK(memcmp(ev[i].data, &i, sizeof(i)) == 0);
                if (i % 2)
                        release(s, &ev[i]);
        }
        tp_ep_close(s->ep);
        barrier(s);
}

static void death_a(struct side *s)
{
        char now = 'n';

        expect_last_words(s);
        oob_send(s, &now, 1);
        expect_down(s, 2 * NS_PER_S);
}

static void death_busy_a(struct side *s)
{
        uint64_t since;
        char now = 'n';

        expect_last_words(s);
        oob_send(s, &now, 1);
        since = clock_ns();
        while (s->q_n == 0 && clock_ns() - since < 2 * NS_PER_S)
                pump(s);
        expect_down(s, 0);
}

static void death_b(struct side *s)
{
        char now;

        last_words(s);
        oob_recv(s, &now, 1);
        raise(SIGKILL);
}

/* b is deaf and then dies: whatever a has outstanding ends exactly once, before the end of the connection. */
static void death_outstanding_a(struct side *s)
{
        static unsigned char buf[1u << 20];
        struct tp_rmem *r;
        char now = 'n';

        take_key(s, &r);
        s->errors_allowed = true;
        for (unsigned i = 0; i < 64; i++) {
                uint64_t cookie = begin_post(s);

                if (i % 2)
                        end_post(s, cookie, tp_read(s->ep, NULL, buf, sizeof(buf), r, 0, 0, cookie));
                else
                        end_post(s, cookie, tp_write(s->ep, NULL, buf, sizeof(buf), r, 0, 0, cookie));
                pump(s);
        }
        oob_send(s, &now, 1);
        expect_down(s, 2 * NS_PER_S);
}

static void death_outstanding_b(struct side *s)
{
        unsigned char *own = malloc(1u << 20);
        struct mem_region region = mem_host_region(own, 1u << 20);
        struct tp_mem *m;
        char now;

        OK(tp_reg(s->ep, &region, &m));
        give_key(s, m, 0, 1u << 20);
        oob_recv_idle(s, &now, 1);
        raise(SIGKILL);
}

/* ---- ep_cycles: connections that come and go leave no descriptors and mappings behind ---- */

#define CYCLES 200u

static void cycles_a(struct side *s)
{
        int fds = 0, maps = 0;

        side_open(s);
        side_learn_url(s);
        for (unsigned i = 0; i < CYCLES; i++) {
                if (i == 20) {
                        fds = count_fds();
                        maps = count_maps();
                }
                side_connect(s, &s->ep);
                last_words(s);
                tp_ep_close(s->ep);
        }
        CHECK(count_fds() <= fds + 4);
        CHECK(count_maps() <= maps + 16);
        barrier(s);
}

static void cycles_b(struct side *s)
{
        int fds = 0, maps = 0;

        side_open(s);
        side_listen(s);
        for (unsigned i = 0; i < CYCLES; i++) {
                if (i == 20) {
                        fds = count_fds();
                        maps = count_maps();
                }
                side_accept(s, &s->ep);
                expect_last_words(s);
                expect_down(s, PATIENCE_NS);
                tp_ep_close(s->ep);
        }
        if (s->backend->processes) {
                CHECK(count_fds() <= fds + 4);
                CHECK(count_maps() <= maps + 16);
        }
        barrier(s);
}

/* ---- cancel ---- */

static void cancel_a(struct side *s)
{
        static unsigned char buf[1u << 20];
        struct tp_rmem *r;
        uint64_t cookie;
        char go = 'g';
        int rc;

        take_key(s, &r);
        CHECK_EQ(tp_cancel(s->ep, 12345), -ENOENT);
        s->errors_allowed = true;
        cookie = begin_post(s);
        while (!end_post(s, cookie, tp_read(s->ep, NULL, buf, sizeof(buf), r, 0, 0, cookie)))
                pump(s);
        rc = s->open_n > 0 ? tp_cancel(s->ep, cookie) : 0;
        CHECK(rc == 0 || rc == -ENOENT);
        oob_send(s, &go, 1);
        settle(s);
        if (s->last_status < 0)
                CHECK_EQ(s->last_status, -ECANCELED);
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        barrier(s);
        expect_quiet(s);
        barrier(s);
}

static void cancel_b(struct side *s)
{
        unsigned char *own = calloc(1, 1u << 20);
        struct mem_region region = mem_host_region(own, 1u << 20);
        struct tp_event ev;
        struct tp_mem *m;
        char go;

        OK(tp_reg(s->ep, &region, &m));
        give_key(s, m, 0, 1u << 20);
        oob_recv_idle(s, &go, 1);
        next_msg(s, &ev);
        release(s, &ev);
        barrier(s);
        barrier(s);
        tp_free(m);
        free(own);
}

/* ---- fault_cut: the wrapper breaks the connection after so many posts ---- */

static void cut_a(struct side *s)
{
        struct tp_event ev;
        unsigned taken = 0;
        int rc;

        side_learn_url(s);
        strcat(s->url, "&cut_after=50");
        side_open(s);
        side_connect(s, &s->ep);
        s->errors_allowed = true;
        while (taken < 1000) {
                uint64_t cookie = begin_post(s);

                rc = tp_send(s->ep, "x", 1, 0, cookie);
                if (rc == -ENOTCONN)
                        break;
                taken += end_post(s, cookie, rc);
                pump(s);
        }
        CHECK(taken >= 50 && taken < 1000);
        next_event(s, &ev);
        CHECK_EQ(ev.kind, TP_EV_DOWN);
        expect_quiet(s);
        barrier(s);
}

static void cut_b(struct side *s)
{
        struct tp_event ev;

        side_open(s);
        side_listen(s);
        side_accept(s, &s->ep);
        do {
                next_event(s, &ev);
                if (ev.kind == TP_EV_MSG)
                        release(s, &ev);
        } while (ev.kind != TP_EV_DOWN);
        barrier(s);
}

const struct tcase life_cases[] = {
    {"many_endpoints", many_a, many_b, BARE},
    {"awake_then_asleep", awake_a, awake_b, BARE | SLEEPY},
    {"connect_nothing", nothing_a, nothing_b, BARE},
    {"connect_deadline", deadline_a, deadline_b, BARE},
    {"listen_twice", listen_twice_a, listen_twice_b, BARE},
    {"port_zero", port_zero_a, port_zero_b, ONLY_PORTS},
    {"peer_close", close_a, close_b, 0},
    {"close_with_loans", close_with_loans_a, close_b, 0},
    {"peer_death", death_a, death_b, PROCESSES},
    {"peer_death_asleep", death_a, death_b, PROCESSES | SLEEPY},
    {"peer_death_busy", death_busy_a, death_b, PROCESSES},
    {"peer_death_outstanding", death_outstanding_a, death_outstanding_b, PROCESSES},
    {"ep_cycles", cycles_a, cycles_b, BARE},
    {"cancel", cancel_a, cancel_b, 0},
    {"fault_cut", cut_a, cut_b, BARE | ONLY_FAULT},
    {NULL, NULL, NULL, 0},
};
