/* perf: the connection between both ends, and what they agree on over it. */
#include <endian.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"

#define QUEUE      4096u /* messages that can wait while something else is waited for */
#define POLL_BATCH 16
#define IDLE_LOOK  1024u /* empty polls between two looks at the clock */

/* ---- polling and posting ---- */

static int link_lost(struct perf_link *l, int status)
{
        l->failed = status < 0 ? status : -ECONNRESET;
        snprintf(l->why, sizeof(l->why), "%s", err_str(l->failed));
        return err_set(l->failed, "%s: %s", l->phase, l->why);
}

static int stop(const struct perf_link *l)
{
        return err_set(-EINTR, "%s: ended by a signal", l->phase);
}

static int take_event(struct perf_link *l, const struct tp_event *ev)
{
        switch (ev->kind) {
        case TP_EV_DONE:
                l->outstanding--;
                return ev->status < 0 && ev->status != -ECANCELED ? link_lost(l, ev->status) : 0;
        case TP_EV_DOWN:
                return link_lost(l, ev->status);
        default:
                if (l->queue_n == QUEUE)
                        return err_set(-EPROTO, "%s: the peer sends more than was agreed", l->phase);
                l->queue[(l->queue_at + l->queue_n++) % QUEUE] = *ev;
                return 0;
        }
}

/* Nothing came: now and then make room for others on this core, and look whether it has been too long. */
static int idle(struct perf_link *l)
{
        uint64_t now;

        cpu_relax();
        if (++l->idle % IDLE_LOOK)
                return 0;
        sched_yield();
        now = clock_ns();
        if (l->idle == IDLE_LOOK)
                l->idle_since = now;
        if (now - l->idle_since < PERF_STALL_NS)
                return 0;
        return err_set(-ETIMEDOUT, "%s: nothing came from %s for %u s", l->phase, l->ep->peer,
                       (unsigned)(PERF_STALL_NS / NS_PER_S));
}

int perf_poll(struct perf_link *l)
{
        struct tp_event ev[POLL_BATCH];
        int n, rc = 0;

        if (perf_stopped)
                return stop(l);
        if (l->failed)
                return err_set(l->failed, "%s: %s", l->phase, l->why);
        n = tp_poll(l->ctx, ev, POLL_BATCH);
        if (n == 0)
                return idle(l);
        l->idle = 0;
        for (int i = 0; i < n; i++) {
                int one = take_event(l, &ev[i]);

                rc = rc ? rc : one;
        }
        return rc ? rc : n;
}

int perf_try(struct perf_link *l, struct tp_event *ev)
{
        if (!l->queue_n) {
                int rc = perf_poll(l);

                if (!l->queue_n)
                        return rc < 0 ? rc : 0;
        }
        *ev = l->queue[l->queue_at];
        l->queue_at = (l->queue_at + 1) % QUEUE;
        l->queue_n--;
        return 1;
}

int perf_next(struct perf_link *l, struct tp_event *ev)
{
        int rc;

        do {
                rc = perf_try(l, ev);
        } while (rc == 0);
        return rc < 0 ? rc : 0;
}

void perf_release(struct perf_link *l, const struct tp_event *ev)
{
        if (ev->kind == TP_EV_MSG)
                tp_release(l->ep, ev->cookie);
}

int perf_drain(struct perf_link *l, unsigned most)
{
        while (l->outstanding > most) {
                int rc = perf_poll(l);

                if (rc < 0)
                        return rc;
        }
        return 0;
}

/* What became of a post: 1 it is done or on its way, 0 try again, -errno. Where posts are complete at once nobody polls
 * for long, so the end is looked for here, too. */
static int posted(struct perf_link *l, int rc)
{
        if (perf_stopped)
                return stop(l);
        if (rc == -EAGAIN) {
                rc = perf_poll(l);
                return rc < 0 ? rc : 0;
        }
        if (rc == TP_POSTED)
                l->outstanding++;
        return rc < 0 ? rc : 1;
}

#define POST(l, call)                          \
        do {                                   \
                int rc_;                       \
                do {                           \
                        rc_ = posted(l, call); \
                } while (rc_ == 0);            \
                return rc_ < 0 ? rc_ : 0;      \
        } while (0)

int perf_send(struct perf_link *l, const void *buf, size_t len, unsigned flags)
{
        POST(l, tp_send(l->ep, buf, len, flags, l->cookie++));
}

int perf_write(struct perf_link *l, const void *src, size_t len, uint64_t roff, unsigned flags)
{
        POST(l, tp_write(l->ep, l->tx_mem, src, len, l->remote, roff, flags, l->cookie++));
}

int perf_write_imm(struct perf_link *l, const void *src, size_t len, uint64_t roff, uint32_t imm)
{
        POST(l, tp_write_imm(l->ep, l->tx_mem, src, len, l->remote, roff, imm, 0, l->cookie++));
}

int perf_read(struct perf_link *l, void *dst, size_t len, uint64_t roff)
{
        POST(l, tp_read(l->ep, l->tx_mem, dst, len, l->remote, roff, 0, l->cookie++));
}

/* ---- control messages ---- */

#define CTL_MAGIC   0x4652455044ull /* "DPERF" */
#define CTL_VERSION 1

struct wire_ctl {
        uint64_t magic;
        uint32_t version, kind;
        uint64_t f[PF_COUNT];
        uint8_t nonce[NONCE_BYTES], proof[PROOF_BYTES];
        uint8_t key[TP_KEY_BYTES];
        char text[160];
};

_Static_assert(sizeof(struct wire_ctl) == 16 + 8 * PF_COUNT + NONCE_BYTES + PROOF_BYTES + TP_KEY_BYTES + 160,
               "no padding on the wire");
_Static_assert(sizeof(struct wire_ctl) <= TP_MSG_MAX_LEAST, "fits in a message of every transport");

int perf_tell(struct perf_link *l, const struct perf_ctl *c)
{
        struct wire_ctl w = {.magic = htole64(CTL_MAGIC), .version = htole32(CTL_VERSION), .kind = htole32(c->kind)};
        int rc;

        for (int i = 0; i < PF_COUNT; i++)
                w.f[i] = htole64(c->f[i]);
        memcpy(w.nonce, c->nonce, sizeof(w.nonce));
        memcpy(w.proof, c->proof, sizeof(w.proof));
        memcpy(w.key, c->key.bytes, sizeof(w.key));
        memcpy(w.text, c->text, sizeof(w.text));
        rc = perf_send(l, &w, sizeof(w), 0);
        return rc < 0 ? rc : perf_drain(l, 0);
}

static int ctl_read(struct perf_link *l, const struct tp_event *ev, struct perf_ctl *c)
{
        struct wire_ctl w;

        if (ev->kind != TP_EV_MSG || ev->len != sizeof(w))
                return err_set(-EPROTO, "%s: %s is no djinnbench perf, or one of another version", l->phase,
                               l->ep->peer);
        memcpy(&w, ev->data, sizeof(w));
        if (le64toh(w.magic) != CTL_MAGIC || le32toh(w.version) != CTL_VERSION)
                return err_set(-EPROTO, "%s: %s is no djinnbench perf, or one of another version than %d", l->phase,
                               l->ep->peer, CTL_VERSION);
        c->kind = le32toh(w.kind);
        for (int i = 0; i < PF_COUNT; i++)
                c->f[i] = le64toh(w.f[i]);
        memcpy(c->nonce, w.nonce, sizeof(w.nonce));
        memcpy(c->proof, w.proof, sizeof(w.proof));
        memcpy(c->key.bytes, w.key, sizeof(w.key));
        memcpy(c->text, w.text, sizeof(w.text));
        c->text[sizeof(c->text) - 1] = '\0';
        return 0;
}

static int sleep_for_event(struct perf_link *l)
{
        while (!l->queue_n) {
                struct tp_event ev;
                int rc = perf_stopped ? stop(l) : tp_wait(l->ctx, &ev, 1, clock_ns() + 100 * NS_PER_MS);

                if (rc > 0)
                        rc = take_event(l, &ev);
                if (rc < 0)
                        return rc;
        }
        l->idle = 0;
        return 0;
}

int perf_hear(struct perf_link *l, enum perf_ctl_kind kind, bool patient, struct perf_ctl *c)
{
        struct tp_event ev;
        int rc = patient ? sleep_for_event(l) : 0;

        rc = rc ? rc : perf_next(l, &ev);
        if (rc < 0)
                return rc;
        rc = ctl_read(l, &ev, c);
        perf_release(l, &ev);
        if (rc < 0)
                return rc;
        if (c->kind == PERF_REFUSED)
                return err_set(-EPERM, "%s: the other end refuses: %s", l->ep->peer, c->text);
        if (c->kind != kind && !(kind == PERF_CASE && c->kind == PERF_BYE))
                return err_set(-EPROTO, "%s: control message %d where %d was expected", l->phase, (int)c->kind,
                               (int)kind);
        return 0;
}

/* ---- agreement ---- */

static const char *const config_names[PF_CONFIG] = {
    [PF_TEST] = "test",           [PF_OP] = "--op",       [PF_SIZES] = "--sizes",     [PF_DEPTH] = "--depth",
    [PF_DURATION] = "--duration", [PF_ITERS] = "--iters", [PF_REPEATS] = "--repeats", [PF_VERIFY] = "--verify",
};

static int refuse(struct perf_link *l, int code, const char *why)
{
        struct perf_ctl c = {.kind = PERF_REFUSED};

        snprintf(c.text, sizeof(c.text), "%.159s", why);
        perf_tell(l, &c);
        return err_set(code, "refused %s: %.159s", l->ep->peer, c.text);
}

/* A value in the words of the command line; it may come from the other end and be anything. */
static const char *config_text(int field, uint64_t value, char *buf, size_t len)
{
        if (field == PF_TEST && value < PERF_TESTS)
                return perf_test_names[value];
        if (field == PF_OP && value < PERF_OPS)
                return perf_op_names[value];
        if (field == PF_VERIFY)
                return value ? "it" : "it not";
        if (field == PF_DURATION)
                snprintf(buf, len, "%g s", (double)value / 1e9);
        else
                snprintf(buf, len, "%llu", (unsigned long long)value);
        return buf;
}

/* The listening end holds to what was on its own command line, and takes the driver's word for the rest. */
static int check_config(struct perf_link *l, const struct perf_opts *o, const struct perf_ctl *hello)
{
        char why[160], here[32], there[32];

        for (int i = 0; i < PF_CONFIG; i++) {
                if (!(o->config_given & 1u << i) || o->config[i] == hello->f[i])
                        continue;
                if (i == PF_SIZES)
                        snprintf(why, sizeof(why), "%s differs: both ends were given lists of their own",
                                 config_names[i]);
                else
                        snprintf(why, sizeof(why), "%s differs: the listening end has %s, the connecting end %s",
                                 config_names[i], config_text(i, o->config[i], here, sizeof(here)),
                                 config_text(i, hello->f[i], there, sizeof(there)));
                return refuse(l, -EPERM, why);
        }
        if (hello->f[PF_REGION] > PERF_REGION_MAX)
                return refuse(l, -EPERM, "more memory is asked for than this end gives");
        if (o->key.present != (hello->f[PF_SEED] != 0))
                return refuse(l, -EPERM,
                              o->key.present ? "this end wants a key (--key-file)"
                                             : "this end has no key (--key-file)");
        return 0;
}

static int link_memory(struct perf_link *l, uint64_t region, struct tp_key *key)
{
        int rc;

        l->region = region;
        if ((rc = tp_alloc(l->ep, region, &l->tx_mem)) < 0 || (rc = tp_alloc(l->ep, region, &l->rx_mem)) < 0 ||
            (rc = tp_export_key(l->rx_mem, 0, region, key)) < 0)
                return err_trail(rc, "while making memory for the measurement");
        l->tx = l->tx_mem->region.addr;
        l->rx = l->rx_mem->region.addr;
        return 0;
}

static int link_import(struct perf_link *l, const struct tp_key *key)
{
        int rc = tp_import_key(l->ep, key, clock_ns() + PERF_STALL_NS, &l->remote);

        if (rc == 0 && l->remote->len != l->region)
                return err_set(-EPROTO, "%s: opened %llu bytes of memory where %llu were agreed on", l->ep->peer,
                               (unsigned long long)l->remote->len, (unsigned long long)l->region);
        return rc;
}

static int link_begin(struct perf_link *l, struct tp_ep *ep)
{
        l->ep = ep;
        l->phase = "agreeing on the measurement";
        l->queue = malloc(QUEUE * sizeof(*l->queue));
        if (!l->queue)
                return err_set(-ENOMEM, "no memory for a connection");
        tp_attr(ep, &l->attr);
        return 0;
}

void perf_unlink(struct perf_link *l)
{
        if (l->ep)
                tp_ep_close(l->ep);
        free(l->queue);
        l->ep = NULL;
        l->queue = NULL;
}

static int driver_agree(struct perf_link *l, const struct perf_opts *o)
{
        struct perf_ctl hello = {.kind = PERF_HELLO}, welcome, auth = {.kind = PERF_AUTH}, authed;
        int rc;

        memcpy(hello.f, o->config, sizeof(o->config));
        hello.f[PF_REGION] = perf_region_bytes(o);
        hello.f[PF_SEED] = o->key.present;
        nonce_random(hello.nonce);
        if ((rc = perf_tell(l, &hello)) < 0 || (rc = perf_hear(l, PERF_WELCOME, false, &welcome)) < 0)
                return rc;
        if (o->key.present)
                auth_prove(&o->key, AUTH_CLIENT, hello.nonce, welcome.nonce, auth.proof);
        if ((rc = link_memory(l, hello.f[PF_REGION], &auth.key)) < 0 || (rc = perf_tell(l, &auth)) < 0 ||
            (rc = perf_hear(l, PERF_AUTHED, false, &authed)) < 0)
                return rc;
        if (o->key.present && !auth_check(&o->key, AUTH_SERVER, hello.nonce, welcome.nonce, authed.proof))
                return err_set(-EPERM, "%s: the other end does not hold the same key", l->ep->peer);
        return link_import(l, &authed.key);
}

static int peer_agree(struct perf_link *l, const struct perf_opts *o)
{
        struct perf_ctl hello, welcome = {.kind = PERF_WELCOME}, auth, authed = {.kind = PERF_AUTHED};
        int rc = perf_hear(l, PERF_HELLO, false, &hello);

        if (rc < 0 || (rc = check_config(l, o, &hello)) < 0)
                return rc;
        nonce_random(welcome.nonce);
        if ((rc = perf_tell(l, &welcome)) < 0 || (rc = perf_hear(l, PERF_AUTH, false, &auth)) < 0)
                return rc;
        if (o->key.present) {
                if (!auth_check(&o->key, AUTH_CLIENT, hello.nonce, welcome.nonce, auth.proof))
                        return refuse(l, -EPERM, "the keys differ");
                auth_prove(&o->key, AUTH_SERVER, hello.nonce, welcome.nonce, authed.proof);
        }
        if ((rc = link_memory(l, hello.f[PF_REGION], &authed.key)) < 0 || (rc = perf_tell(l, &authed)) < 0)
                return rc;
        return link_import(l, &auth.key);
}

int perf_connect(struct perf_link *l, const struct perf_opts *o, const char *url)
{
        uint64_t until = clock_ns() + (uint64_t)o->wait_s * NS_PER_S;
        struct tp_ep *ep;
        int rc;

        for (;;) {
                rc = tp_connect(l->ctx, url, clock_ns() + PERF_STALL_NS, &ep);
                if (rc != -ECONNREFUSED || clock_ns() >= until || perf_stopped)
                        break;
                clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = 20 * NS_PER_MS}, NULL);
        }
        if (rc < 0 || (rc = link_begin(l, ep)) < 0)
                return rc;
        return driver_agree(l, o);
}

int perf_accept(struct perf_link *l, const struct perf_opts *o, struct tp_listener *tl)
{
        struct tp_ep *ep;
        int rc;

        while ((rc = tp_accept(tl, &ep)) == -EAGAIN) {
                struct tp_event ev;

                rc = perf_stopped ? err_set(-EINTR, "ended by a signal while nobody had connected")
                                  : tp_wait(l->ctx, &ev, 1, clock_ns() + 20 * NS_PER_MS);
                if (rc < 0)
                        return rc;
        }
        if (rc < 0 || (rc = link_begin(l, ep)) < 0)
                return rc;
        return peer_agree(l, o);
}
