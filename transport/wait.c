/*
 * tp_wait for every backend: poll for a while, then sleep on the context's descriptor.
 */
#include <errno.h>
#include <poll.h>

#include "clock.h"
#include "transport.h"

/* Reading the clock costs as much as several polls, so it is read once per that many. */
#define POLLS_PER_CLOCK 32

/* A nap never lasts longer than this: should a peer forget to wake us, it costs latency and not a hang. */
#define NAP_MAX_NS (500 * NS_PER_MS)

static int spin(struct tp_ctx *ctx, struct tp_event *ev, int max, uint64_t until_ns)
{
        do {
                for (int i = 0; i < POLLS_PER_CLOCK; i++) {
                        int n = tp_poll(ctx, ev, max);

                        if (n != 0)
                                return n;
                }
        } while (clock_ns() < until_ns);
        return 0;
}

static void nap(struct tp_ctx *ctx, uint64_t now_ns, uint64_t deadline_ns)
{
        struct pollfd p = {.fd = tp_fd(ctx), .events = POLLIN};
        uint64_t ns = deadline_ns - now_ns < NAP_MAX_NS ? deadline_ns - now_ns : NAP_MAX_NS;
        struct timespec ts = {.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};

        ppoll(&p, 1, &ts, NULL);
}

int tp_wait(struct tp_ctx *ctx, struct tp_event *ev, int max, uint64_t deadline_ns)
{
        int n = tp_poll(ctx, ev, max);
        uint64_t now;

        if (n != 0)
                return n;
        now = clock_ns();
        if (ctx->spin_ns > 0) {
                uint64_t until = now + ctx->spin_ns;

                n = spin(ctx, ev, max, until < deadline_ns ? until : deadline_ns);
        }
        while (n == 0 && (now = clock_ns()) < deadline_ns) {
                if (tp_arm(ctx) == 0) {
                        nap(ctx, now, deadline_ns);
                        tp_disarm(ctx);
                }
                n = tp_poll(ctx, ev, max);
        }
        return n;
}
