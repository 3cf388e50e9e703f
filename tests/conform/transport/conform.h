/*
 * The conformance suite: one program, `tp_conform BACKEND CASE`, in which side a connects to side b. Sides are two
 * threads or two processes, each with a context of its own; beside the transport under test they have a socket pair
 * (out of band, "oob") for keys, URLs and barriers.
 *
 * A failed check prints where and ends the process at once; exit 77 means that the backend or the case is not to be had
 * here and prints why.
 */
#ifndef DJINN_TP_CONFORM_H
#define DJINN_TP_CONFORM_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "prng.h"
#include "transport.h"

#define EXIT_SKIP   77
#define PATIENCE_NS (30 * NS_PER_S) /* how long anything that must come may take on a crowded machine */

#define FAIL(...) conform_fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(cond)                        \
        do {                               \
                if (!(cond))               \
                        FAIL("%s", #cond); \
        } while (0)
#define CHECK_EQ(a, b)                                                          \
        do {                                                                    \
                long long a_ = (long long)(a), b_ = (long long)(b);             \
                if (a_ != b_)                                                   \
                        FAIL("%s is %lld, expected %s = %lld", #a, a_, #b, b_); \
        } while (0)
/* For calls of the contract: prints the sentence too. */
#define OK(call)                                             \
        do {                                                 \
                int rc_ = (call);                            \
                if (rc_ < 0)                                 \
                        FAIL("%s: %s", #call, err_str(rc_)); \
        } while (0)

/* A post that must fail with this; -EAGAIN before that is in order (the fault wrapper says it at random). */
#define REFUSED(post, code)                                                                 \
        do {                                                                                \
                int got_, tries_ = 0;                                                       \
                while ((got_ = (post)) == -EAGAIN && tries_++ < 100000)                     \
                        ;                                                                   \
                if (got_ != (code))                                                         \
                        FAIL("%s is %d (%s), expected %s", #post, got_, err_text(), #code); \
                CHECK(err_text()[0]);                                                       \
        } while (0)

_Noreturn void conform_fail(const char *file, int line, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

struct backend {
        const char *name;
        const char *url;     /* to listen on; %d becomes the process id */
        bool processes;      /* sides are two processes */
        bool one_sided_only; /* null: only a, nothing arrives */
};

struct side {
        const struct backend *backend;
        bool is_a;
        int oob;
        struct tp_open_opts opts;
        char url[TP_URL_MAX];
        struct tp_ctx *ctx;
        struct tp_listener *listener;
        struct tp_ep *ep;
        struct tp_attr attr;
        struct prng prng;

        /* events other than DONE, in order, waiting for next_event */
        struct tp_event *queue;
        size_t q_first, q_n, q_cap;

        /* posts that have not completed */
        uint64_t *open_cookies;
        size_t open_n, open_cap;
        uint64_t next_cookie;
        uint64_t completions;
        int last_status;     /* of the latest DONE */
        bool errors_allowed; /* DONE with an error is no failure */
};

typedef void (*side_fn)(struct side *s);

#define BARE       1u /* the case opens, listens and connects itself */
#define PROCESSES  2u /* makes sense only between processes */
#define ONLY_FAULT 4u
#define ONLY_PORTS 8u  /* backends whose URL has a port */
#define SLEEPY     16u /* contexts sleep at once */
#define NOT_FAULT  32u
#define ONLY_NULL  64u

struct tcase {
        const char *name;
        side_fn a, b;
        unsigned flags;
};

extern const struct tcase message_cases[], bulk_cases[], life_cases[], device_cases[],
    thousand_cases[]; /* each ends with name NULL */

/* ---- sides ---- */
void side_open(struct side *s);
void side_listen(struct side *s);    /* b: listens and tells a the URL */
void side_learn_url(struct side *s); /* a: hears it */
void side_accept(struct side *s, struct tp_ep **out);
void side_connect(struct side *s, struct tp_ep **out);
bool side_is_fault(const struct side *s);

/* ---- out of band; pumps the transport while it waits ---- */
void oob_send(struct side *s, const void *buf, size_t len);
void oob_recv(struct side *s, void *buf, size_t len);
void oob_recv_idle(struct side *s, void *buf, size_t len); /* does not pump: this side is deaf meanwhile */
void barrier(struct side *s);

/* ---- events ---- */
int pump(struct side *s); /* one poll; number of events seen */
bool next_event_in(struct side *s, struct tp_event *ev, uint64_t ns);
void next_event(struct side *s, struct tp_event *ev); /* waits for it */
void next_msg(struct side *s, struct tp_event *ev);   /* must be a message */
void release(struct side *s, const struct tp_event *ev);
void expect_quiet(struct side *s);   /* after a barrier: nothing more has come */
uint64_t begin_post(struct side *s); /* a cookie */
/* Books the post's return: TP_COMPLETE at once, TP_POSTED as outstanding. True unless it was -EAGAIN. */
bool end_post(struct side *s, uint64_t cookie, int rc);
void settle(struct side *s); /* until nothing is outstanding */

/* ---- posts that go on until taken ---- */
void do_send(struct side *s, struct tp_ep *ep, const void *buf, size_t len, unsigned flags);
void do_write(struct side *s, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *r, uint64_t roff,
              unsigned flags);
void do_write_imm(struct side *s, const void *src, size_t len, struct tp_rmem *r, uint64_t roff, uint32_t imm,
                  unsigned flags);
void do_read(struct side *s, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *r, uint64_t roff);

/* ---- keys ---- */
void give_key(struct side *s, struct tp_mem *mem, size_t off, size_t len);
void take_key(struct side *s, struct tp_rmem **out);

/* ---- data that tells its place ---- */
void pattern_fill(void *buf, size_t len, uint64_t seq);
bool pattern_ok(const void *buf, size_t len, uint64_t seq);

int count_fds(void);
int count_maps(void);

#endif
