#include "server_client.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "json.h"
#include "workload.h"

#define PATIENCE_NS (20 * NS_PER_S)

/* ---- server ---- */

struct test_server {
        pthread_t thread;
        struct server_opts opts;
        volatile sig_atomic_t stop;
        char shm[64], loop[64];
        const char *urls[3];
        char ready[3][TP_URL_MAX];
        int rc;
};

static void *run_server(void *arg)
{
        struct test_server *s = arg;

        s->rc = server_run(&s->opts);
        if (s->rc < 0)
                fprintf(stderr, "server: %s\n", err_text());
        return NULL;
}

struct test_server *ts_start(const struct server_opts *opts)
{
        static unsigned serial;
        struct test_server *s = calloc(1, sizeof(*s));
        int fds[2];
        FILE *f;

        assert_non_null(s);
        s->opts = opts ? *opts : (struct server_opts){.device = "reference", .cpu = -1};
        snprintf(s->shm, sizeof(s->shm), "shm://djinn-test-%d-%u", (int)getpid(), serial);
        snprintf(s->loop, sizeof(s->loop), "loop://djinn-test-%u", serial++);
        s->urls[0] = "tcp://127.0.0.1:0";
        s->urls[1] = s->shm;
        s->urls[2] = s->loop;
        if (!s->opts.urls) {
                s->opts.urls = s->urls;
                s->opts.nurls = 3;
        }
        assert_return_code(pipe(fds), errno);
        s->opts.ready_fd = fds[1];
        s->opts.stop = &s->stop;
        assert_int_equal(pthread_create(&s->thread, NULL, run_server, s), 0);
        f = fdopen(fds[0], "r");
        assert_non_null(f);
        for (size_t i = 0; i < s->opts.nurls; i++) {
                assert_non_null(fgets(s->ready[i], TP_URL_MAX, f));
                s->ready[i][strcspn(s->ready[i], "\n")] = '\0';
        }
        fclose(f);
        return s;
}

const char *ts_url(const struct test_server *s, const char *scheme)
{
        for (size_t i = 0; i < s->opts.nurls; i++) {
                if (strncmp(s->ready[i], scheme, strlen(scheme)) == 0)
                        return s->ready[i];
        }
        fail_msg("no listener for %s", scheme);
        return NULL;
}

int ts_stop(struct test_server *s)
{
        int rc;

        __atomic_store_n(&s->stop, 1, __ATOMIC_RELAXED);
        pthread_join(s->thread, NULL);
        rc = s->rc;
        free(s);
        return rc;
}

/* ---- client ---- */

static void expect(int rc)
{
        if (rc < 0)
                fail_msg("%d: %s", rc, err_text());
}

void cl_connect(struct client *c, const char *url)
{
        *c = (struct client){.next_id = 1};
        expect(tp_open(url, NULL, &c->ctx));
        expect(tp_connect(c->ctx, url, clock_ns() + PATIENCE_NS, &c->ep));
        tp_attr(c->ep, &c->attr);
        c->frame = calloc(1, c->attr.msg_max);
        c->inbox = calloc(1, c->attr.msg_max);
        assert_true(c->frame && c->inbox);
}

void cl_vanish(struct client *c)
{
        tp_close(c->ctx);
        free(c->frame);
        free(c->inbox);
        *c = (struct client){0};
}

void cl_close(struct client *c)
{
        struct msg_header bye;

        if (!c->down)
                cl_send(c, &bye, sizeof(bye), MSG_BYE, 0);
        cl_vanish(c);
}

/* One event, waiting for it. */
static void pump(struct client *c, uint64_t deadline_ns)
{
        struct tp_event ev;

        if (tp_wait(c->ctx, &ev, 1, deadline_ns) == 0)
                fail_msg("%s: nothing came for 20 s", c->ep->peer);
        if (ev.kind == TP_EV_DOWN)
                c->down = true;
        if (ev.kind != TP_EV_MSG)
                return;
        c->inbox_len = ev.len;
        memcpy(c->inbox, ev.data, ev.len);
        tp_release(c->ep, ev.cookie);
}

uint64_t cl_send(struct client *c, void *frame, size_t len, enum msg_opcode op, uint32_t flags)
{
        uint64_t id = c->next_id++;
        struct tp_event ev;
        int rc;

        msg_header_init(frame, op, len, flags, id);
        while ((rc = tp_send(c->ep, frame, len, 0, 1)) == -EAGAIN)
                sched_yield();
        if (rc == -ENOTCONN)
                c->down = true;
        /* Frames on the stack must not be left with the transport. */
        for (uint64_t end = clock_ns() + PATIENCE_NS; rc == TP_POSTED && clock_ns() < end;) {
                int n = tp_poll(c->ctx, &ev, 1);

                if (n == 1 && ev.kind == TP_EV_DONE && ev.cookie == 1)
                        break;
                if (n == 1 && ev.kind == TP_EV_MSG)
                        fail_msg("an answer came before the question was gone");
        }
        return id;
}

unsigned cl_next(struct client *c)
{
        uint64_t deadline = clock_ns() + PATIENCE_NS;

        for (;;) {
                const struct msg_header *h = (const struct msg_header *)c->inbox;

                c->inbox_len = 0;
                if (!c->down)
                        pump(c, deadline);
                if (c->down)
                        return 0;
                if (c->inbox_len == 0)
                        continue;
                if (msg_check(c->inbox, c->inbox_len) < 0)
                        fail_msg("the server sent: %s", err_text());
                if (h->opcode != MSG_CREDIT)
                        return h->opcode;
        }
}

int cl_answer(struct client *c, enum msg_opcode op, uint64_t id)
{
        const struct msg_header *h = (const struct msg_header *)c->inbox;
        const struct msg_error *e = (const struct msg_error *)c->inbox;
        unsigned got = cl_next(c);

        if (got == 0)
                return -ECONNRESET;
        if (got == MSG_ERROR && (h->request_id == id || h->flags & MSG_FATAL)) {
                c->error = e->code;
                c->phase = e->phase;
                c->field = e->field;
                c->error_flags = h->flags;
                memcpy(c->text, e->text, sizeof(e->text));
                return e->code;
        }
        if (got != op || h->request_id != id)
                fail_msg("expected %s for %llu, got %s for %llu", msg_opcode_name(op), (unsigned long long)id,
                         msg_opcode_name(got), (unsigned long long)h->request_id);
        return 0;
}

int cl_try(struct client *c, void *frame, size_t len, enum msg_opcode op, enum msg_opcode answer)
{
        return cl_answer(c, answer, cl_send(c, frame, len, op, 0));
}

static uint8_t nonce_c[NONCE_BYTES], nonce_s[NONCE_BYTES];

int cl_hello(struct client *c, const struct auth_key *key, uint32_t flags)
{
        struct msg_hello m = {.version_min = MSG_VERSION, .version_max = MSG_VERSION, .needs_key = key != NULL};
        int rc;

        nonce_random(nonce_c);
        memcpy(m.nonce, nonce_c, NONCE_BYTES);
        rc = cl_answer(c, MSG_HELLO, cl_send(c, &m, sizeof(m), MSG_HELLO, flags));
        if (rc == 0)
                memcpy(nonce_s, ((const struct msg_hello *)c->inbox)->nonce, NONCE_BYTES);
        return rc;
}

int cl_auth(struct client *c, const struct auth_key *key)
{
        struct msg_auth m = {0};
        int rc;

        if (key)
                auth_prove(key, AUTH_CLIENT, nonce_c, nonce_s, m.proof);
        rc = cl_try(c, &m, sizeof(m), MSG_AUTH, MSG_AUTH);
        if (rc < 0)
                return rc;
        assert_int_equal(c->inbox_len, sizeof(c->server));
        memcpy(&c->server, c->inbox, sizeof(c->server));
        if (key)
                assert_true(auth_check(key, AUTH_SERVER, nonce_c, nonce_s, c->server.proof));
        return 0;
}

void cl_open(struct client *c, const char *url)
{
        cl_connect(c, url);
        assert_int_equal(cl_hello(c, NULL, 0), 0);
        assert_int_equal(cl_auth(c, NULL), 0);
}

/* ---- models and memory ---- */

int cl_load(struct client *c, const struct graph *g, enum msg_weights weights, uint64_t seed, const char *id,
            struct msg_loaded *out)
{
        struct msg_load m = {.total_len = g->h->total_bytes, .weights = weights, .seed = seed};
        uint32_t room = (uint32_t)(c->attr.msg_max - sizeof(m));
        uint64_t rid = 0;
        int rc;

        if (id)
                snprintf(m.model_id, sizeof(m.model_id), "%s", id);
        for (uint32_t off = 0; off < m.total_len; off += m.part_len) {
                m.offset = off;
                m.part_len = m.total_len - off < room ? m.total_len - off : room;
                memcpy(c->frame, &m, sizeof(m));
                memcpy(c->frame + sizeof(m), (const uint8_t *)g->h + off, m.part_len);
                rid = cl_send(c, c->frame, sizeof(m) + m.part_len, MSG_LOAD, 0);
        }
        rc = cl_answer(c, MSG_LOADED, rid);
        if (rc == 0)
                memcpy(out, c->inbox, sizeof(*out));
        return rc;
}

void cl_region(struct client *c, size_t len)
{
        struct msg_keys k = {.kind = KEYS_GIVE, .len = len};
        struct tp_key key;

        expect(tp_alloc(c->ep, len, &c->region));
        c->bytes = c->region->region.addr;
        expect(tp_export_key(c->region, 0, len, &key));
        memcpy(k.key, key.bytes, sizeof(k.key));
        assert_int_equal(cl_try(c, &k, sizeof(k), MSG_KEYS, MSG_KEYS), 0);
}

int cl_ask(struct client *c, enum msg_keys_kind kind, uint32_t model, uint32_t index, size_t len, struct tp_rmem **out)
{
        struct msg_keys k = {.kind = kind, .model = model, .index = index, .len = len};
        struct tp_key key;
        int rc = cl_try(c, &k, sizeof(k), MSG_KEYS, MSG_KEYS);

        if (rc < 0)
                return rc;
        memcpy(key.bytes, ((const struct msg_keys *)c->inbox)->key, sizeof(key.bytes));
        expect(tp_import_key(c->ep, &key, clock_ns() + PATIENCE_NS, out));
        return 0;
}

void cl_write(struct client *c, const void *src, size_t len, struct tp_rmem *to, uint64_t off)
{
        struct tp_event ev;
        int rc;

        while ((rc = tp_write(c->ep, NULL, src, len, to, off, 0, 2)) == -EAGAIN)
                sched_yield();
        expect(rc);
        while (rc == TP_POSTED) {
                assert_int_equal(tp_wait(c->ctx, &ev, 1, clock_ns() + PATIENCE_NS), 1);
                assert_int_equal(ev.kind, TP_EV_DONE);
                assert_int_equal(ev.status, 0);
                rc = TP_COMPLETE;
        }
}

/* ---- RUN ---- */

void run_range(struct cl_run *r, uint32_t first, uint32_t count, uint32_t rows, uint32_t repeat, uint32_t feedback)
{
        r->ranges[r->run.nranges++] = (struct run_range){first, count, rows, repeat, feedback, 0};
}

void run_inline(struct cl_run *r, uint32_t tensor, const void *data, size_t len)
{
        r->inputs[r->run.ninputs++] =
            (struct run_input){.tensor = tensor, .flags = INPUT_INLINE, .offset = r->run.inline_len, .len = len};
        memcpy(r->bytes + r->run.inline_len, data, len);
        r->run.inline_len += (uint32_t)len;
}

void run_written(struct cl_run *r, uint32_t tensor, size_t len)
{
        r->inputs[r->run.ninputs++] = (struct run_input){.tensor = tensor, .flags = INPUT_WRITTEN, .len = len};
}

void run_output(struct cl_run *r, uint32_t tensor, uint32_t flags, size_t len, uint64_t region_off, uint32_t step)
{
        r->outputs[r->run.noutputs++] =
            (struct run_output){.tensor = tensor, .flags = flags, .len = len, .region_off = region_off, .step = step};
}

uint64_t cl_run_send(struct client *c, const struct cl_run *r)
{
        size_t len = msg_run_pack(c->frame, &r->run, r->ranges, r->feedback, r->inputs, r->outputs, r->bytes);

        return cl_send(c, c->frame, len, MSG_RUN, r->run.h.flags);
}

int cl_run(struct client *c, const struct cl_run *r, struct msg_done *done)
{
        int rc = cl_answer(c, MSG_DONE, cl_run_send(c, r));

        if (rc == 0)
                memcpy(done, c->inbox, sizeof(*done));
        return rc;
}

/* ---- graphs ---- */

void graph_echo(struct graph *out, size_t bytes)
{
        expect(echo_build(bytes, out));
}

void graph_tiny(struct graph *out, uint32_t rows_max)
{
        static const char text[] =
            "{\"model_type\":\"gpt2\",\"n_embd\":16,\"n_layer\":2,\"n_head\":2,\"n_positions\":64,"
            "\"vocab_size\":61}";
        json *config = json_parse(text, sizeof(text) - 1, "test");

        assert_non_null(config);
        expect(gpt2_build(config, 1, rows_max, 64, DT_F32, out));
        json_free(config);
}
