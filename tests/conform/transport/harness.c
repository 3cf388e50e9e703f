#include "conform.h"

#include <dirent.h>
#include <sched.h>
#include <stdarg.h>
#include <sys/socket.h>
#include <unistd.h>

_Noreturn void conform_fail(const char *file, int line, const char *fmt, ...)
{
        va_list ap;

        fprintf(stderr, "%s:%d: FAILED: ", file, line);
        va_start(ap, fmt);
        vfprintf(stderr, fmt, ap);
        va_end(ap);
        fputc('\n', stderr);
        _exit(1);
}

/* ---- sides ---- */

bool side_is_fault(const struct side *s)
{
        return !strncmp(s->backend->name, "fault+", 6);
}

void side_open(struct side *s)
{
        int rc = tp_open(s->url, &s->opts, &s->ctx);

        if (rc == -ENOTSUP || rc == -ENOENT) {
                fprintf(stderr, "skipped: %s\n", err_text());
                _exit(EXIT_SKIP);
        }
        OK(rc);
}

void side_listen(struct side *s)
{
        OK(tp_listen(s->ctx, s->url, &s->listener));
        oob_send(s, s->listener->url, TP_URL_MAX);
}

void side_learn_url(struct side *s)
{
        oob_recv(s, s->url, TP_URL_MAX);
}

void side_accept(struct side *s, struct tp_ep **out)
{
        uint64_t deadline = clock_ns() + PATIENCE_NS;
        int rc;

        while ((rc = tp_accept(s->listener, out)) == -EAGAIN) {
                if (clock_ns() > deadline)
                        FAIL("nobody came to %s", s->listener->url);
                pump(s);
                sched_yield();
        }
        OK(rc);
        tp_attr(*out, &s->attr);
}

void side_connect(struct side *s, struct tp_ep **out)
{
        OK(tp_connect(s->ctx, s->url, clock_ns() + PATIENCE_NS, out));
        tp_attr(*out, &s->attr);
}

/* ---- out of band ---- */

void oob_send(struct side *s, const void *buf, size_t len)
{
        const char *p = buf;

        while (len > 0) {
                ssize_t n = send(s->oob, p, len, MSG_NOSIGNAL);

                if (n < 0)
                        FAIL("the other side has gone: %s", strerror(errno));
                p += n;
                len -= (size_t)n;
        }
}

static void oob_recv_with(struct side *s, void *buf, size_t len, bool pumping)
{
        uint64_t deadline = clock_ns() + 2 * PATIENCE_NS;
        char *p = buf;

        while (len > 0) {
                ssize_t n = recv(s->oob, p, len, pumping ? MSG_DONTWAIT : 0);

                if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
                        FAIL("the other side has gone");
                if (n > 0) {
                        p += n;
                        len -= (size_t)n;
                        continue;
                }
                if (clock_ns() > deadline)
                        FAIL("the other side says nothing");
                if (s->ctx)
                        pump(s);
                sched_yield();
        }
}

void oob_recv(struct side *s, void *buf, size_t len)
{
        oob_recv_with(s, buf, len, true);
}

void oob_recv_idle(struct side *s, void *buf, size_t len)
{
        oob_recv_with(s, buf, len, false);
}

void barrier(struct side *s)
{
        char c = 'b';

        oob_send(s, &c, 1);
        oob_recv(s, &c, 1);
        CHECK(c == 'b');
}

/* ---- events ---- */

static void enqueue(struct side *s, const struct tp_event *ev)
{
        if (s->q_n == s->q_cap) {
                size_t cap = s->q_cap ? 2 * s->q_cap : 64;
                struct tp_event *q = malloc(cap * sizeof(*q));

                CHECK(q);
                for (size_t i = 0; i < s->q_n; i++)
                        q[i] = s->queue[(s->q_first + i) % s->q_cap];
                free(s->queue);
                s->queue = q;
                s->q_first = 0;
                s->q_cap = cap;
        }
        s->queue[(s->q_first + s->q_n++) % s->q_cap] = *ev;
}

/* A completion must belong to a post that is outstanding: this is where a second one, or an invented one, shows. */
static void complete(struct side *s, const struct tp_event *ev)
{
        for (size_t i = 0; i < s->open_n; i++) {
                if (s->open_cookies[i] != ev->cookie)
                        continue;
                s->open_cookies[i] = s->open_cookies[--s->open_n];
                s->completions++;
                s->last_status = ev->status;
                if (ev->status < 0 && !s->errors_allowed)
                        FAIL("post %llu ended in %s", (unsigned long long)ev->cookie, strerror(-ev->status));
                return;
        }
        FAIL("completion of %llu, which is not outstanding", (unsigned long long)ev->cookie);
}

static void take(struct side *s, const struct tp_event *ev)
{
        CHECK(ev->ep != NULL);
        if (ev->kind == TP_EV_DONE)
                complete(s, ev);
        else
                enqueue(s, ev);
}

int pump(struct side *s)
{
        struct tp_event ev[16];
        int n = tp_poll(s->ctx, ev, 16);

        CHECK(n >= 0 && n <= 16);
        for (int i = 0; i < n; i++)
                take(s, &ev[i]);
        return n;
}

bool next_event_in(struct side *s, struct tp_event *out, uint64_t ns)
{
        uint64_t deadline = clock_ns() + ns;
        struct tp_event ev[4];

        while (s->q_n == 0) {
                int n = tp_wait(s->ctx, ev, 4, deadline);

                CHECK(n >= 0);
                for (int i = 0; i < n; i++)
                        take(s, &ev[i]);
                if (s->q_n == 0 && clock_ns() >= deadline)
                        return false;
        }
        *out = s->queue[s->q_first];
        s->q_first = (s->q_first + 1) % s->q_cap;
        s->q_n--;
        return true;
}

void next_event(struct side *s, struct tp_event *ev)
{
        if (!next_event_in(s, ev, PATIENCE_NS))
                FAIL("side %c: nothing came", s->is_a ? 'a' : 'b');
}

void next_msg(struct side *s, struct tp_event *ev)
{
        next_event(s, ev);
        if (ev->kind != TP_EV_MSG)
                FAIL("side %c: event kind %d status %d (%s), expected a message", s->is_a ? 'a' : 'b', ev->kind,
                     ev->status, err_text());
}

void release(struct side *s, const struct tp_event *ev)
{
        tp_release(ev->ep, ev->cookie);
}

void expect_quiet(struct side *s)
{
        for (int i = 0; i < 1000; i++)
                pump(s);
        if (s->q_n > 0)
                FAIL("side %c: an event of kind %d too many", s->is_a ? 'a' : 'b', s->queue[s->q_first].kind);
}

uint64_t begin_post(struct side *s)
{
        return ++s->next_cookie;
}

bool end_post(struct side *s, uint64_t cookie, int rc)
{
        if (rc == -EAGAIN)
                return false;
        if (rc < 0)
                FAIL("post refused: %s", err_str(rc));
        if (rc == TP_COMPLETE) {
                s->completions++;
                return true;
        }
        CHECK_EQ(rc, TP_POSTED);
        if (s->open_n == s->open_cap) {
                s->open_cap = s->open_cap ? 2 * s->open_cap : 64;
                s->open_cookies = realloc(s->open_cookies, s->open_cap * sizeof(uint64_t));
                CHECK(s->open_cookies);
        }
        s->open_cookies[s->open_n++] = cookie;
        return true;
}

/* After a refused post: see what has come, and let the other side run where there are more sides than cores. */
static void step_back(struct side *s, uint64_t deadline)
{
        if (pump(s) == 0) {
                sched_yield();
                if (clock_ns() > deadline)
                        FAIL("side %c: -EAGAIN for ever", s->is_a ? 'a' : 'b');
        }
}

void settle(struct side *s)
{
        uint64_t deadline = clock_ns() + PATIENCE_NS;

        while (s->open_n > 0)
                step_back(s, deadline);
}

/* ---- posts ---- */

#define UNTIL_TAKEN(post)                                                             \
        do {                                                                          \
                uint64_t deadline = clock_ns() + PATIENCE_NS, cookie = begin_post(s); \
                while (!end_post(s, cookie, post))                                    \
                        step_back(s, deadline);                                       \
        } while (0)

void do_send(struct side *s, struct tp_ep *ep, const void *buf, size_t len, unsigned flags)
{
        UNTIL_TAKEN(tp_send(ep, buf, len, flags, cookie));
}

void do_write(struct side *s, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *r, uint64_t roff,
              unsigned flags)
{
        UNTIL_TAKEN(tp_write(r->ep, mem, src, len, r, roff, flags, cookie));
}

void do_write_imm(struct side *s, const void *src, size_t len, struct tp_rmem *r, uint64_t roff, uint32_t imm,
                  unsigned flags)
{
        UNTIL_TAKEN(tp_write_imm(r->ep, NULL, src, len, r, roff, imm, flags, cookie));
}

void do_read(struct side *s, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *r, uint64_t roff)
{
        UNTIL_TAKEN(tp_read(r->ep, mem, dst, len, r, roff, 0, cookie));
}

/* ---- keys ---- */

void give_key(struct side *s, struct tp_mem *mem, size_t off, size_t len)
{
        struct tp_key key;

        OK(tp_export_key(mem, off, len, &key));
        oob_send(s, &key, sizeof(key));
}

void take_key(struct side *s, struct tp_rmem **out)
{
        struct tp_key key;

        oob_recv(s, &key, sizeof(key));
        OK(tp_import_key(s->ep, &key, clock_ns() + PATIENCE_NS, out));
}

/* ---- data ---- */

void pattern_fill(void *buf, size_t len, uint64_t seq)
{
        unsigned char *p = buf;

        for (size_t i = 0; i < len; i += 8) {
                uint64_t w = prng_at(0x5eed, seq, i);

                memcpy(p + i, &w, len - i < 8 ? len - i : 8);
        }
}

bool pattern_ok(const void *buf, size_t len, uint64_t seq)
{
        const unsigned char *p = buf;

        for (size_t i = 0; i < len; i += 8) {
                uint64_t w = prng_at(0x5eed, seq, i);

                if (memcmp(p + i, &w, len - i < 8 ? len - i : 8) != 0) {
                        fprintf(stderr, "pattern %llu of %zu bytes is wrong near byte %zu\n", (unsigned long long)seq,
                                len, i);
                        return false;
                }
        }
        return true;
}

int count_fds(void)
{
        DIR *d = opendir("/proc/self/fd");
        int n = 0;

        CHECK(d);
        while (readdir(d))
                n++;
        closedir(d);
        return n;
}

/* Sanitizers map memory of their own as they please, so there the answer says nothing. */
int count_maps(void)
{
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
        return 0;
#endif
        FILE *f = fopen("/proc/self/maps", "r");
        int n = 0, c;

        CHECK(f);
        while ((c = getc(f)) != EOF)
                n += c == '\n';
        fclose(f);
        return n;
}
