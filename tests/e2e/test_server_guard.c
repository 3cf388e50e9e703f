/* What a client must not get: keys, limits, deadlines, lies, and the others' peace. */
#include "server_client.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "prng.h"

static const char *const schemes[] = {"loop", "shm", "tcp"};

static const struct server_opts plain = {.device = "reference", .cpu = -1};

/* ---- a bystander: another session that must go on being served ---- */

struct bystander {
        struct client c;
        struct graph g;
        struct cl_run r;
};

static void bystander_open(struct bystander *b, const struct test_server *s)
{
        struct msg_loaded m;

        *b = (struct bystander){0};
        graph_echo(&b->g, 16);
        cl_open(&b->c, ts_url(s, "loop"));
        assert_int_equal(cl_load(&b->c, &b->g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_region(&b->c, 64);
        run_range(&b->r, 0, 1, 1, 1, 0);
        run_inline(&b->r, 0, "still being here", 16);
        run_output(&b->r, 1, 0, 16, 0, 0);
        b->r.run.model = m.model;
        b->r.run.h.flags = RUN_PLAN_CACHE;
}

static void bystander_check(struct bystander *b)
{
        struct msg_done done;

        memset(b->c.bytes, 0, 64);
        assert_int_equal(cl_run(&b->c, &b->r, &done), 0);
        assert_memory_equal(b->c.bytes, "still being here", 16);
}

static void bystander_close(struct bystander *b)
{
        cl_close(&b->c);
        graph_free(&b->g);
}

/* ---- keys ---- */

static void keys(void **state)
{
        struct server_opts o = plain;
        struct auth_key wrong;
        struct test_server *s;
        struct client c;

        key_random(&o.key);
        key_random(&wrong);
        s = ts_start(&o);
        for (size_t i = 0; i < ARRAY_LEN(schemes); i++) {
                cl_connect(&c, ts_url(s, schemes[i]));
                assert_int_equal(cl_hello(&c, &o.key, 0), 0);
                assert_int_equal(((const struct msg_hello *)c.inbox)->needs_key, 1);
                assert_int_equal(cl_auth(&c, &o.key), 0);
                cl_close(&c);

                /* Wrong, and none: told "refused", and nothing else ever. */
                for (int none = 0; none < 2; none++) {
                        cl_connect(&c, ts_url(s, schemes[i]));
                        assert_int_equal(cl_hello(&c, none ? NULL : &wrong, 0), 0);
                        assert_int_equal(cl_auth(&c, none ? NULL : &wrong), -EACCES);
                        assert_string_equal(c.text, "refused");
                        assert_true(c.error_flags & MSG_FATAL);
                        assert_int_equal(cl_next(&c), 0);
                        cl_vanish(&c);
                }
                /* A proof for another nonce is none. */
                cl_connect(&c, ts_url(s, schemes[i]));
                assert_int_equal(cl_hello(&c, &o.key, 0), 0);
                {
                        struct msg_auth a = {0};
                        uint8_t nonce[NONCE_BYTES] = {0};

                        auth_prove(&o.key, AUTH_CLIENT, nonce, nonce, a.proof);
                        assert_int_equal(cl_try(&c, &a, sizeof(a), MSG_AUTH, MSG_AUTH), -EACCES);
                }
                cl_vanish(&c);
        }
        assert_int_equal(ts_stop(s), 0);
}

static void no_key_here(void **state)
{
        struct auth_key key;
        struct test_server *s = ts_start(&plain);
        struct client c;

        key_random(&key);
        cl_connect(&c, ts_url(s, "tcp"));
        assert_int_equal(cl_hello(&c, &key, 0), -EACCES);
        assert_non_null(strstr(c.text, "has none"));
        cl_vanish(&c);
        assert_int_equal(ts_stop(s), 0);
}

/* A listener on all addresses counts as off loopback, wherever the client is. */
static void off_loopback(void **state)
{
        static const char *const any[] = {"tcp://0.0.0.0:0"};
        struct server_opts o = plain;
        char url[TP_URL_MAX];
        struct client c;

        o.urls = any;
        o.nurls = 1;
        for (int insecure = 0; insecure < 2; insecure++) {
                struct test_server *s;

                o.insecure = insecure;
                s = ts_start(&o);
                snprintf(url, sizeof(url), "tcp://127.0.0.1%s", strrchr(ts_url(s, "tcp"), ':'));
                for (int says = 0; says < 2; says++) {
                        cl_connect(&c, url);
                        assert_int_equal(cl_hello(&c, NULL, says ? HELLO_INSECURE : 0), insecure && says ? 0 : -EACCES);
                        cl_vanish(&c);
                }
                assert_int_equal(ts_stop(s), 0);
        }
}

static void versions(void **state)
{
        struct msg_hello m = {.version_min = 2, .version_max = 9};
        struct test_server *s = ts_start(&plain);
        struct client c;

        cl_connect(&c, ts_url(s, "loop"));
        assert_int_equal(cl_try(&c, &m, sizeof(m), MSG_HELLO, MSG_HELLO), -EPROTO);
        assert_non_null(strstr(c.text, "speaks 1"));
        cl_vanish(&c);
        assert_int_equal(ts_stop(s), 0);
}

/* Before the proof every message but the handshake's is refused, with the same word. */
static void strangers(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct client c;
        uint8_t frame[512];

        for (unsigned op = 1; op < MSG_OPCODES; op++) {
                if (op == MSG_HELLO || op == MSG_BYE || op == MSG_ERROR)
                        continue;
                memset(frame, 0, sizeof(frame));
                cl_connect(&c, ts_url(s, "loop"));
                assert_int_equal(cl_try(&c, frame, op == MSG_STATS ? 24 : 64, op, op), -EACCES);
                assert_string_equal(c.text, "refused");
                assert_int_equal(cl_next(&c), 0);
                cl_vanish(&c);
        }
        assert_int_equal(ts_stop(s), 0);
}

static void raw_connect(const char *url, int *fd)
{
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(strrchr(url, ':') + 1))};

        inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
        *fd = socket(AF_INET, SOCK_STREAM, 0);
        assert_return_code(connect(*fd, (struct sockaddr *)&to, sizeof(to)), errno);
}

static void random_bytes(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct bystander b;
        struct prng p;

        prng_seed(&p, 99);
        bystander_open(&b, s);
        for (int k = 0; k < 40; k++) {
                uint8_t noise[600];
                int fd;

                for (size_t i = 0; i < sizeof(noise); i++)
                        noise[i] = (uint8_t)prng_u64(&p);
                raw_connect(ts_url(s, "tcp"), &fd);
                (void)!send(fd, noise, 1 + prng_below(&p, sizeof(noise)), MSG_NOSIGNAL);
                if (k % 4 == 0)
                        shutdown(fd, SHUT_WR);
                bystander_check(&b);
                close(fd);
        }
        bystander_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

/* Connections that never say anything have a deadline and a bound, and keep nobody out. */
static void silent_crowd(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct client crowd[70], late;
        struct bystander b;
        int fds[100];

        bystander_open(&b, s);
        for (size_t i = 0; i < ARRAY_LEN(fds); i++)
                raw_connect(ts_url(s, "tcp"), &fds[i]);
        bystander_check(&b);
        for (size_t i = 0; i < ARRAY_LEN(crowd); i++)
                cl_connect(&crowd[i], ts_url(s, "tcp")); /* the transports have met, and that is all */
        cl_open(&late, ts_url(s, "tcp"));
        cl_close(&late);
        for (size_t i = 0; i < ARRAY_LEN(crowd); i++)
                cl_vanish(&crowd[i]);
        for (size_t i = 0; i < ARRAY_LEN(fds); i++) {
                char byte;

                /* Closed by the other end, at the latest when its handshake is due. */
                assert_true(recv(fds[i], &byte, 1, 0) <= 0);
                close(fds[i]);
        }
        bystander_check(&b);
        bystander_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

/* ---- limits ---- */

static uint64_t memory_left(struct client *c, const struct graph *g)
{
        struct msg_loaded m;
        uint64_t n = 0;
        int rc;

        while ((rc = cl_load(c, g, MSG_WEIGHTS_SEED, 1, NULL, &m)) == 0)
                n++;
        assert_int_equal(rc, -EDQUOT);
        return n;
}

/* What a client held is there again when it has vanished, in whatever state it was. */
static void memory(void **state)
{
        struct server_opts o = plain;
        struct test_server *s;
        struct graph g, echo;
        uint64_t models = 0;

        graph_tiny(&g, 8);
        graph_echo(&echo, 3 << 20);
        o.memory_bytes = 4 << 20;
        s = ts_start(&o);
        for (size_t i = 0; i < 6; i++) {
                struct cl_run r = {0};
                struct msg_loaded m;
                struct tp_rmem *rmem;
                struct client c;
                uint64_t n;

                cl_open(&c, ts_url(s, schemes[i % 3]));
                assert_int_equal(c.server.limits.memory_bytes, 4 << 20);
                assert_int_equal(cl_load(&c, &echo, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
                assert_int_equal(cl_ask(&c, KEYS_ASK_TENSOR, m.model, 0, 0, &rmem), 0);
                run_range(&r, 0, 1, 1, 1, 0);
                r.run.model = m.model;
                assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), -EDQUOT); /* the output does not fit */
                assert_int_equal(cl_ask(&c, KEYS_ASK_STAGING, 0, 0, 2 << 20, &rmem), -EDQUOT);
                assert_int_equal(cl_ask(&c, KEYS_ASK_STAGING, 0, 0, UINT64_MAX, &rmem), -EDQUOT);
                n = memory_left(&c, &g);
                models = models ? models : n;
                assert_int_equal(n, models);
                i % 2 ? cl_vanish(&c) : cl_close(&c);
        }
        graph_free(&g);
        graph_free(&echo);
        assert_int_equal(ts_stop(s), 0);
}

/* Staging for `c` once whoever held the memory before has been noticed to be gone: a second at most, on any medium. */
static int ask_in_time(struct client *c, uint64_t len, struct tp_rmem **rmem)
{
        uint64_t deadline_ns = clock_ns() + 5 * NS_PER_S;
        int rc;

        do
                rc = cl_ask(c, KEYS_ASK_STAGING, 0, 0, len, rmem);
        while (rc == -EDQUOT && clock_ns() < deadline_ns);
        return rc;
}

/* All sessions together have a limit too, and what they held counts no more when they have gone. */
static void memory_of_all(void **state)
{
        struct server_opts o = plain;
        struct test_server *s;
        struct tp_rmem *rmem;
        struct client a, b;

        o.memory_bytes = 4 << 20;
        o.memory_total_bytes = 6 << 20;
        s = ts_start(&o);
        cl_open(&b, ts_url(s, "loop"));
        for (size_t i = 0; i < 3; i++) {
                cl_open(&a, ts_url(s, schemes[i]));
                assert_int_equal(ask_in_time(&a, 4 << 20, &rmem), 0);
                assert_int_equal(cl_ask(&b, KEYS_ASK_STAGING, 0, 0, 3 << 20, &rmem), -EDQUOT);
                assert_non_null(strstr(b.text, "sessions of this server"));
                i % 2 ? cl_vanish(&a) : cl_close(&a);
        }
        assert_int_equal(ask_in_time(&b, 3 << 20, &rmem), 0);
        cl_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

/* Buffers of a connection that joined are given back with it. */
static void joined_memory(void **state)
{
        struct server_opts o = plain;
        struct test_server *s;
        struct client a, b;

        o.memory_bytes = 4 << 20;
        s = ts_start(&o);
        cl_open(&a, ts_url(s, "loop"));
        for (unsigned i = 0; i < 6; i++) {
                struct msg_join j = {.session_id = a.server.session_id,
                                     .join_secret = {a.server.join_secret[0], a.server.join_secret[1]}};
                struct tp_rmem *rmem;

                cl_connect(&b, ts_url(s, schemes[i % 3]));
                assert_int_equal(cl_hello(&b, NULL, 0), 0);
                assert_int_equal(cl_try(&b, &j, sizeof(j), MSG_JOIN, MSG_JOIN), 0);
                assert_int_equal(cl_ask(&b, KEYS_ASK_STAGING, 0, 0, 2 << 20, &rmem), 0);
                assert_int_equal(cl_ask(&b, KEYS_ASK_SHADOW, 0, 0, 1 << 20, &rmem), 0);
                cl_close(&b);
                cl_open(&b, ts_url(s, "loop")); /* by now the server has buried it */
                cl_close(&b);
        }
        cl_close(&a);
        assert_int_equal(ts_stop(s), 0);
}

/* Kept plans are the session's memory; where there is none left, older ones make room and every program still runs. */
static void plans_cost_memory(void **state)
{
        struct server_opts o = plain;
        struct test_server *s;
        struct tp_rmem *rmem;
        struct msg_loaded m;
        struct client c;
        struct graph g;

        graph_tiny(&g, 1);
        o.memory_bytes = 1 << 20;
        s = ts_start(&o);
        cl_open(&c, ts_url(s, "loop"));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), 0);
        for (int pass = 0; pass < 2; pass++) {
                for (uint32_t n = g.h->nnodes; n > 0; n--) {
                        for (uint32_t first = 0; first + n <= g.h->nnodes; first++) {
                                struct cl_run r = {.run = {.model = m.model, .h.flags = RUN_PLAN_CACHE}};

                                run_range(&r, first, n, 1, 1, 0);
                                assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), 0);
                        }
                }
        }
        assert_int_equal(cl_ask(&c, KEYS_ASK_STAGING, 0, 0, 700 << 10, &rmem), -EDQUOT);
        cl_close(&c);
        cl_open(&c, ts_url(s, "loop"));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), 0);
        assert_int_equal(cl_ask(&c, KEYS_ASK_STAGING, 0, 0, 700 << 10, &rmem), 0);
        cl_close(&c);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

/* What a request returns, pass over pass, is bounded as what a session holds: also where it is only digested. */
static void outputs_bounded(void **state)
{
        struct server_opts o = plain;
        struct cl_run r = {0};
        struct test_server *s;
        struct msg_loaded m;
        struct client c;
        struct graph g;

        graph_echo(&g, 1 << 20);
        o.memory_bytes = 4 << 20;
        s = ts_start(&o);
        cl_open(&c, ts_url(s, "loop"));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_region(&c, 1 << 20);
        run_range(&r, 0, 1, 1, 1, 0);
        r.run.model = m.model;
        r.run.h.flags = RUN_DIGEST;
        for (int i = 0; i < 5; i++) {
                run_output(&r, 1, 0, 1 << 20, 0, 0);
                assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), i < 4 ? 0 : -EDQUOT);
        }
        cl_close(&c);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

/* A body of nothing but elements would cost the parser many times its own length. */
static void swollen_call(void **state)
{
        static const uint8_t head[] = {0xdf, 0, 0, 0, 1, 0xa1, 'a', 0xdd, 0, 1, 0x11, 0x70};
        static uint8_t body[sizeof(head) + 70000];
        struct serial_call dec = {0};

        memset(body, 0xc0, sizeof(body));
        memcpy(body, head, sizeof(head));
        assert_int_equal(serial_unpack_call(body, sizeof(body), &dec), -EPROTO);
        assert_non_null(strstr(err_text(), "broken at byte"));
        err_clear();
        serial_call_free(&dec);
}

/* Weights that share their recipes would make a small graph a lot of work. */
static void shared_chain(void **state)
{
        struct test_server *s = ts_start(&plain);
        unsigned with = 0, first = 0;
        struct msg_loaded m;
        struct client c;
        struct graph g;

        graph_tiny(&g, 1);
        cl_open(&c, ts_url(s, "loop"));
        for (unsigned t = 0; t < g.h->ntensors; t++) {
                if (g.tensors[t].recipe == GRAPH_NONE)
                        continue;
                if (with++ == 0)
                        first = g.tensors[t].recipe;
                else
                        g.tensors[t].recipe = (uint16_t)first;
        }
        assert_true(with > 1);
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), -EINVAL);
        assert_non_null(strstr(c.text, "more than one tensor"));
        cl_close(&c);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

static void flop(void **state)
{
        struct server_opts o = plain;
        struct cl_run r = {0};
        struct test_server *s;
        struct msg_loaded m;
        struct client c;
        struct graph g;

        graph_tiny(&g, 8);
        o.flop_per_request = 2e6;
        s = ts_start(&o);
        cl_open(&c, ts_url(s, "loop"));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), 0);
        run_range(&r, 0, 4, 1, 1, 0);
        r.run.model = m.model;
        r.run.h.flags = RUN_PLAN_CACHE;
        assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), 0);
        r.ranges[0].repeat = 60000;
        assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), -EDQUOT);
        assert_non_null(strstr(c.text, "FLOP"));
        r.ranges[0].repeat = 1;
        assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), 0);
        cl_close(&c);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

static void sessions(void **state)
{
        struct server_opts o = plain;
        struct test_server *s;
        struct client a, b;

        o.sessions_max = 1;
        s = ts_start(&o);
        cl_open(&a, ts_url(s, "loop"));
        cl_connect(&b, ts_url(s, "tcp"));
        assert_int_equal(cl_hello(&b, NULL, 0), 0);
        assert_int_equal(cl_auth(&b, NULL), -EBUSY);
        cl_vanish(&b);
        cl_close(&a);
        for (int rc = -1; rc < 0;) { /* until the server has seen that a is gone */
                cl_connect(&b, ts_url(s, "shm"));
                assert_int_equal(cl_hello(&b, NULL, 0), 0);
                rc = cl_auth(&b, NULL);
                assert_true(rc == 0 || rc == -EBUSY);
                cl_vanish(&b);
        }
        assert_int_equal(ts_stop(s), 0);
}

/* ---- time ---- */

/* A RUN that takes a long time: many decode iterations. */
static struct cl_run long_run(uint32_t model, uint32_t nodes)
{
        struct cl_run r = {.run = {.model = model, .h.flags = RUN_PLAN_CACHE}};

        run_range(&r, 0, nodes, 32, 60000, 0);
        return r;
}

static void cancel(struct client *c, uint64_t id)
{
        struct msg_model_ref ref = {0};

        msg_header_init(&ref.h, MSG_CANCEL, sizeof(ref), 0, id);
        assert_int_equal(tp_send(c->ep, &ref, sizeof(ref), 0, 0), TP_COMPLETE);
}

static void deadline_and_cancel(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct bystander b;
        struct msg_loaded m;
        struct client c;
        struct cl_run r;
        struct graph g;
        uint64_t id, queued, start;
        struct msg_header beat;

        graph_tiny(&g, 32);
        bystander_open(&b, s);
        cl_open(&c, ts_url(s, "tcp"));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), 0);
        r = long_run(m.model, g.h->nnodes);
        r.run.deadline_ns = 30 * NS_PER_MS;
        start = clock_ns();
        assert_int_equal(cl_run(&c, &r, &(struct msg_done){0}), -ETIMEDOUT);
        assert_true(clock_ns() - start >= 30 * NS_PER_MS);
        assert_int_equal(c.error_flags & MSG_FATAL, 0);

        r.run.deadline_ns = 0;
        id = cl_run_send(&c, &r);
        /* It holds the engine; whoever does not need that is served meanwhile, and what waits can be given up. */
        assert_int_equal(cl_try(&b.c, &beat, sizeof(beat), MSG_ECHO, MSG_ECHO), 0);
        queued = cl_run_send(&b.c, &b.r);
        assert_int_equal(cl_try(&b.c, &beat, sizeof(beat), MSG_ECHO, MSG_ECHO), 0);
        cancel(&b.c, queued);
        assert_int_equal(cl_answer(&b.c, MSG_DONE, queued), -ECANCELED);
        b.r.run.deadline_ns = 20 * NS_PER_MS;
        assert_int_equal(cl_run(&b.c, &b.r, &(struct msg_done){0}), -ETIMEDOUT);
        assert_non_null(strstr(b.c.text, "in the queue"));
        b.r.run.deadline_ns = 0;
        cancel(&c, id);
        cancel(&c, 4711); /* nobody's */
        assert_int_equal(cl_answer(&c, MSG_DONE, id), -ECANCELED);
        bystander_check(&b);
        cl_close(&c);
        bystander_close(&b);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

/* Waits that were asked for are no excuse for keeping another's program from running. */
static void holds_starve_nobody(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct msg_loaded m;
        struct client a, c;
        struct graph g;
        struct cl_run r;
        uint64_t id, start;

        graph_tiny(&g, 32);
        cl_open(&a, ts_url(s, "loop"));
        cl_open(&c, ts_url(s, "loop"));
        assert_int_equal(cl_load(&a, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), 0);
        r = long_run(m.model, g.h->nnodes);
        r.ranges[0].repeat = 40;
        assert_int_equal(cl_run(&a, &r, &(struct msg_done){0}), 0); /* the plan is there */
        start = clock_ns();
        id = cl_run_send(&a, &r);
        assert_int_equal(cl_try(&a, &(struct msg_header){0}, 24, MSG_ECHO, MSG_ECHO), 0); /* it is under way */
        for (int i = 0; i < 40; i++) {
                struct msg_pattern p = {.hold_ns = 5 * NS_PER_S, .reply_len = sizeof(struct msg_pattern_reply)};

                cl_send(&c, &p, sizeof(p), MSG_PATTERN, 0);
        }
        assert_int_equal(cl_answer(&a, MSG_DONE, id), 0);
        assert_true(clock_ns() - start < 4 * NS_PER_S);
        cl_vanish(&c);
        cl_close(&a);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

/* Messages that are received and not given back, so that their places in the ring stay taken. */
struct hoard {
        uint64_t cookies[1024];
        unsigned n;
};

static bool hoard_one(struct client *c, struct hoard *h)
{
        uint64_t until = clock_ns() + NS_PER_S / 5;
        struct tp_event ev;

        while (clock_ns() < until && h->n < ARRAY_LEN(h->cookies)) {
                if (tp_poll(c->ctx, &ev, 1) != 1 || ev.kind != TP_EV_MSG)
                        continue;
                h->cookies[h->n++] = ev.cookie;
                return true;
        }
        return false;
}

static void send_call(struct client *c, const struct graph *g, const struct cl_run *r)
{
        struct run_view v = {&r->run, r->ranges, r->feedback, r->inputs, r->outputs, NULL};
        struct msg_call *m = (struct msg_call *)c->frame;
        struct serial_buf b = {0};

        assert_int_equal(serial_pack_call(&b, &v, g, NULL, 0), 0);
        *m = (struct msg_call){.body_len = b.len};
        memcpy(m + 1, b.data, b.len);
        cl_send(c, m, sizeof(*m) + b.len, MSG_CALL, 0);
        serial_free(&b);
}

/* Calls whose model is busy, because an answer of its last one is not taken, hold nobody's engine; and the model that
 * they wait for cannot be dropped under them. */
static void calls_wait_aside(void **state)
{
        struct test_server *s = ts_start(&plain);
        unsigned results = 0, busy = 0;
        struct msg_model_ref drop = {.what = 1};
        struct bystander b;
        struct msg_loaded m;
        struct hoard h = {0};
        struct cl_run r = {0};
        struct client c;
        uint64_t start;

        bystander_open(&b, s);
        cl_open(&c, ts_url(s, "shm"));
        assert_int_equal(cl_load(&c, &b.g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        run_range(&r, 0, 1, 1, 1, 0);
        drop.model = r.run.model = m.model;
        do {
                cl_send(&c, &(struct msg_header){0}, 24, MSG_ECHO, 0);
        } while (hoard_one(&c, &h));
        assert_in_range(h.n, 8, ARRAY_LEN(h.cookies) - 1);
        for (int i = 0; i < 3; i++)
                send_call(&c, &b.g, &r);
        start = clock_ns();
        for (int i = 0; i < 3; i++)
                bystander_check(&b);
        cl_send(&c, &drop, sizeof(drop), MSG_DROP, 0);
        bystander_check(&b);
        assert_true(clock_ns() - start < 2 * NS_PER_S);
        for (unsigned i = 0; i < h.n; i++)
                tp_release(c.ep, h.cookies[i]);
        while (results < 3 || busy < 1) {
                unsigned got = cl_next(&c);

                assert_true(got == MSG_ECHO || got == MSG_RESULT || got == MSG_ERROR);
                results += got == MSG_RESULT;
                if (got == MSG_ERROR)
                        assert_int_equal(((const struct msg_error *)c.inbox)->code, -EBUSY);
                busy += got == MSG_ERROR;
        }
        assert_int_equal(cl_try(&c, &drop, sizeof(drop), MSG_DROP, MSG_DROP), 0);
        cl_close(&c);
        bystander_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

static void vanish_while_running(void **state)
{
        struct server_opts o = plain;
        struct test_server *s;
        struct bystander b;
        struct graph g;

        graph_tiny(&g, 32);
        o.memory_bytes = 4 << 20;
        s = ts_start(&o);
        bystander_open(&b, s);
        for (size_t i = 0; i < 6; i++) {
                struct msg_loaded m;
                struct client c;
                struct cl_run r;

                cl_open(&c, ts_url(s, schemes[i % 3]));
                assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_SEED, 1, NULL, &m), 0);
                r = long_run(m.model, g.h->nnodes);
                cl_run_send(&c, &r);
                cl_run_send(&c, &r); /* and one behind it in the queue */
                if (i >= 3)
                        assert_int_equal(cl_try(&b.c, &(struct msg_header){0}, 24, MSG_ECHO, MSG_ECHO), 0);
                cl_vanish(&c);
                bystander_check(&b);
        }
        bystander_close(&b);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

/* ---- lies ---- */

static void lies(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct bystander b;
        struct msg_loaded m;
        struct client c;
        struct cl_run r;
        struct msg_keys k = {.kind = KEYS_GIVE, .index = 3, .len = 64};
        struct msg_done done;

        bystander_open(&b, s);
        cl_open(&c, ts_url(s, "shm"));
        assert_int_equal(cl_load(&c, &b.g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_region(&c, 64);
        r = b.r;
        r.run.model = m.model;

        /* Wrong, but understood: refused, with what and where, and the session goes on. */
        r.outputs[0].region_off = 49;
        assert_int_equal(cl_run(&c, &r, &done), -EINVAL);
        assert_int_equal(c.field, 0);
        assert_int_equal(c.phase, PH_RUN);
        assert_non_null(strstr(c.text, "outside region 0"));
        r.outputs[0].region_off = 0;
        r.outputs[0].region = 1;
        assert_int_equal(cl_run(&c, &r, &done), -EINVAL);
        r.outputs[0].region = 0;
        r.run.model = 5;
        assert_int_equal(cl_run(&c, &r, &done), -ENOENT);
        r.run.model = m.model;
        r.ranges[0].count = 2;
        assert_int_equal(cl_run(&c, &r, &done), -EINVAL);
        r.ranges[0].count = 1;
        assert_int_equal(cl_try(&c, &k, sizeof(k), MSG_KEYS, MSG_KEYS), -EACCES); /* a key of zeros */
        k = (struct msg_keys){.kind = KEYS_REVOKE, .index = 3};
        assert_int_equal(cl_try(&c, &k, sizeof(k), MSG_KEYS, MSG_KEYS), -ENOENT);
        k = (struct msg_keys){.kind = KEYS_ASK_TENSOR, .model = m.model, .index = 2};
        assert_int_equal(cl_try(&c, &k, sizeof(k), MSG_KEYS, MSG_KEYS), -EINVAL);
        assert_int_equal(cl_load(&c, &b.g, MSG_WEIGHTS_CHECKPOINT, 0, "../etc", &m), -EINVAL);
        assert_int_equal(cl_load(&c, &b.g, MSG_WEIGHTS_CHECKPOINT, 0, "no/such-model", &m), -ENOENT);
        assert_int_equal(cl_run(&c, &r, &done), 0);
        k = (struct msg_keys){.kind = KEYS_REVOKE, .index = 0};
        assert_int_equal(cl_try(&c, &k, sizeof(k), MSG_KEYS, MSG_KEYS), 0);
        assert_int_equal(cl_run(&c, &r, &done), -EINVAL);

        /* Broken: the connection ends, and only that one. */
        r.run.nranges = 0;
        assert_int_equal(cl_run(&c, &r, &done), -EPROTO);
        assert_true(c.error_flags & MSG_FATAL);
        assert_int_equal(cl_next(&c), 0);
        cl_vanish(&c);
        bystander_check(&b);
        bystander_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

/* More than the credit, without reading an answer. */
static void flood(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct bystander b;

        bystander_open(&b, s);
        for (size_t i = 0; i < ARRAY_LEN(schemes); i++) {
                struct msg_time t = {0};
                struct client c;
                int rc = 0;

                cl_open(&c, ts_url(s, schemes[i]));
                msg_header_init(&t.h, MSG_TIME, sizeof(t), 0, 1);
                for (int k = 0; k < 5000 && rc != -ENOTCONN; k++) {
                        rc = tp_send(c.ep, &t, sizeof(t), 0, 0);
                        if (k % 500 == 0)
                                bystander_check(&b);
                }
                cl_vanish(&c);
                bystander_check(&b);
        }
        bystander_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

/* A client that asks and does not listen: its answers wait for it for a while, and then it is given up. */
static void deaf(void **state)
{
        const size_t len = 16 << 20;
        struct test_server *s = ts_start(&plain);
        uint64_t start;
        struct bystander b;
        struct msg_loaded m;
        struct client c;
        struct graph g;
        struct cl_run r = {0};

        graph_echo(&g, len);
        bystander_open(&b, s);
        cl_open(&c, ts_url(s, "tcp"));
        assert_int_equal(cl_load(&c, &g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
        cl_region(&c, len);
        run_range(&r, 0, 1, 1, 1, 0);
        run_output(&r, 1, 0, len, 0, 0);
        r.run.model = m.model;
        cl_run_send(&c, &r);
        cl_run_send(&c, &r); /* must not write over what the first is still sending */
        for (start = clock_ns(); clock_ns() - start < 6 * NS_PER_S;)
                bystander_check(&b);
        while (!c.down) {
                if (cl_next(&c) != 0)
                        assert_int_equal(((const struct msg_header *)c.inbox)->opcode, MSG_ERROR);
        }
        cl_vanish(&c);
        bystander_close(&b);
        graph_free(&g);
        assert_int_equal(ts_stop(s), 0);
}

/* Frames of an honest client with a few bytes changed: whatever comes of it, the others are served. */
static void mutated(void **state)
{
        struct test_server *s = ts_start(&plain);
        struct bystander b;
        struct msg_loaded m;
        struct client c = {0};
        struct prng p;
        unsigned survived = 0;

        prng_seed(&p, 1234);
        bystander_open(&b, s);
        for (unsigned k = 0; k < 600; k++) {
                struct msg_keys keys = {.kind = 1 + k % 5, .len = 64};
                struct msg_put put = {.len = 8};
                size_t len = sizeof(keys);
                struct tp_event ev;

                if (!c.ep) {
                        cl_open(&c, ts_url(s, schemes[k % 3]));
                        assert_int_equal(cl_load(&c, &b.g, MSG_WEIGHTS_NONE, 0, NULL, &m), 0);
                        cl_region(&c, 64);
                }
                memcpy(c.frame, &keys, sizeof(keys));
                msg_header_init((struct msg_header *)c.frame, MSG_KEYS, len, 0, c.next_id);
                if (k % 3 == 0) {
                        b.r.run.model = m.model;
                        len = msg_run_pack(c.frame, &b.r.run, b.r.ranges, b.r.feedback, b.r.inputs, b.r.outputs,
                                           b.r.bytes);
                } else if (k % 3 == 1) {
                        len = sizeof(put);
                        memcpy(c.frame, &put, len);
                        msg_header_init((struct msg_header *)c.frame, k % 2 ? MSG_PUT : MSG_GET, len, 0, c.next_id);
                }
                /* Most often behind the header, so that it is looked at; now and then in it. */
                for (uint64_t n = 1 + prng_below(&p, 3); n > 0; n--) {
                        uint64_t from = prng_below(&p, 4) == 0 ? 0 : sizeof(struct msg_header);

                        c.frame[from + prng_below(&p, len - from)] ^= (uint8_t)(1u << prng_below(&p, 8));
                }
                while (tp_send(c.ep, c.frame, len, 0, 0) == -EAGAIN)
                        assert_true(tp_poll(c.ctx, &ev, 1) >= 0);
                /* Until it has been looked at: it is answered, or the connection ends. */
                {
                        unsigned got = cl_next(&c);
                        const struct msg_header *h = (const struct msg_header *)c.inbox;

                        if (got == 0 || (got == MSG_ERROR && h->flags & MSG_FATAL)) {
                                cl_vanish(&c);
                                continue;
                        }
                        survived++;
                }
        }
        assert_in_range(survived, 100, 599);
        if (c.ep)
                cl_close(&c);
        bystander_check(&b);
        bystander_close(&b);
        assert_int_equal(ts_stop(s), 0);
}

int main(void)
{
        const struct CMUnitTest tests[] = {
            cmocka_unit_test(keys),
            cmocka_unit_test(no_key_here),
            cmocka_unit_test(off_loopback),
            cmocka_unit_test(versions),
            cmocka_unit_test(strangers),
            cmocka_unit_test(random_bytes),
            cmocka_unit_test(silent_crowd),
            cmocka_unit_test(memory),
            cmocka_unit_test(memory_of_all),
            cmocka_unit_test(joined_memory),
            cmocka_unit_test(plans_cost_memory),
            cmocka_unit_test(outputs_bounded),
            cmocka_unit_test(swollen_call),
            cmocka_unit_test(shared_chain),
            cmocka_unit_test(flop),
            cmocka_unit_test(sessions),
            cmocka_unit_test(deadline_and_cancel),
            cmocka_unit_test(holds_starve_nobody),
            cmocka_unit_test(calls_wait_aside),
            cmocka_unit_test(vanish_while_running),
            cmocka_unit_test(lies),
            cmocka_unit_test(flood),
            cmocka_unit_test(deaf),
            cmocka_unit_test(mutated),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
