/* perf: what one thread says and hears on its connections, outside of what is measured. */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"

#define POLL_BATCH 16
#define OUT_RING   4u /* control messages that may be on their way */

#define CTL_MAGIC   0x4652455044ull /* "DPERF" */
#define CTL_VERSION 3

/* Every version begins with these four, so that each can tell the other why it is refused. */
struct wire_ctl {
        uint64_t magic;
        uint32_t version, kind;
        char why[160];
        uint64_t f[PF_COUNT];
        uint8_t nonce[NONCE_BYTES], proof[PROOF_BYTES];
        uint8_t key[TP_KEY_BYTES];
        uint8_t body[PERF_BODY];
};

#define WIRE_HEAD offsetof(struct wire_ctl, f)

_Static_assert(WIRE_HEAD == 176, "the same in every version");
_Static_assert(sizeof(struct wire_ctl) ==
                   WIRE_HEAD + 8 * PF_COUNT + NONCE_BYTES + PROOF_BYTES + TP_KEY_BYTES + PERF_BODY,
               "no padding on the wire");
_Static_assert(sizeof(struct wire_ctl) <= TP_MSG_MAX_LEAST, "fits in a message of every transport");

/* ---- waiting ---- */

static int stopped(const struct perf_session *s)
{
        return err_set(-EINTR, "%s: ended by a signal", s->phase);
}

/* Nothing came for a while: make room for others on this core, and look whether it has been too long. */
int perf_idle_look(struct perf_worker *w)
{
        struct perf_session *s = w->s;
        uint64_t now = clock_ns();

        if (perf_stopped)
                return stopped(s);
        if (atomic_load_explicit(&s->failed, memory_order_relaxed))
                return err_set(-ECANCELED, "%s: another thread of this end failed", s->phase);
        sched_yield();
        if (w->idle == 1024)
                w->idle_since = now;
        if (now - w->idle_since < s->stall_ns)
                return 0;
        return err_set(-ETIMEDOUT, "%s: nothing came from %s for %.3g s (--stall)", s->phase, s->peer,
                       (double)s->stall_ns / 1e9);
}

int perf_take(struct perf_worker *w, const struct tp_event *ev)
{
        struct perf_conn *c = ev->ep->user;

        if (!c) { /* a connection that is not ours: somebody else at our listener's door */
                if (ev->kind == TP_EV_MSG)
                        tp_release(ev->ep, ev->cookie);
                else if (ev->kind == TP_EV_DOWN)
                        tp_ep_close(ev->ep);
                return 0;
        }
        if (ev->kind == TP_EV_DOWN)
                return err_set(ev->status < 0 ? ev->status : -ECONNRESET, "%s: %s", w->s->phase, err_str(ev->status));
        if (ev->kind != TP_EV_DONE)
                return err_set(-EPROTO, "%s: a message from %s that nobody asked for", w->s->phase, ev->ep->peer);
        c->outstanding--;
        if (ev->status < 0 && ev->status != -ECANCELED)
                return err_set(ev->status, "%s: %s: %s", w->s->phase, ev->ep->peer, err_str(ev->status));
        return 0;
}

/* Polls once; messages are queued. */
static int poll_once(struct perf_worker *w)
{
        struct tp_event ev[POLL_BATCH];
        unsigned room = PERF_QUEUE - w->queue_n;
        int n, rc = 0;

        if (perf_stopped)
                return stopped(w->s);
        if (!room)
                return err_set(-EPROTO, "%s: %s sends more than was agreed", w->s->phase, w->s->peer);
        n = tp_poll(w->ctx, ev, room < POLL_BATCH ? (int)room : POLL_BATCH);
        if (n <= 0)
                return n < 0 ? n : perf_idle(w);
        w->idle = 0;
        for (int i = 0; i < n; i++) {
                if (ev[i].ep->user && (ev[i].kind == TP_EV_MSG || ev[i].kind == TP_EV_IMM))
                        w->queue[w->queue_n++] = ev[i];
                else
                        rc = rc ? rc : perf_take(w, &ev[i]);
        }
        return rc;
}

int perf_drain(struct perf_conn *c)
{
        int rc = 0;

        while (c->outstanding && !rc)
                rc = poll_once(c->w);
        return rc;
}

/* Takes the first message of this connection out of the queue, or of any where ep is NULL. */
static bool take_kept(struct perf_worker *w, const struct tp_ep *ep, struct tp_event *ev)
{
        for (unsigned i = 0; i < w->queue_n; i++) {
                if (ep && w->queue[i].ep != ep)
                        continue;
                *ev = w->queue[i];
                memmove(&w->queue[i], &w->queue[i + 1], (--w->queue_n - i) * sizeof(w->queue[0]));
                return true;
        }
        return false;
}

bool perf_kept(struct perf_worker *w, struct tp_event *ev)
{
        return take_kept(w, NULL, ev);
}

/* Connections do not wait for one another, so that of another one may come first. */
static int next_message(struct perf_conn *c, struct tp_event *ev)
{
        int rc = 0;

        while (!take_kept(c->w, c->ep, ev) && !rc)
                rc = poll_once(c->w);
        return rc;
}

/* ---- control messages ---- */

static void encode(struct wire_ctl *out, const struct perf_ctl *m)
{
        *out =
            (struct wire_ctl){.magic = htole64(CTL_MAGIC), .version = htole32(CTL_VERSION), .kind = htole32(m->kind)};
        for (int i = 0; i < PF_COUNT; i++)
                out->f[i] = htole64(m->f[i]);
        memcpy(out->why, m->why, sizeof(out->why));
        memcpy(out->nonce, m->nonce, sizeof(out->nonce));
        memcpy(out->proof, m->proof, sizeof(out->proof));
        memcpy(out->key, m->key.bytes, sizeof(out->key));
        memcpy(out->body, m->body, sizeof(out->body));
}

static struct wire_ctl *next_out(struct perf_worker *w, const struct perf_ctl *m)
{
        struct wire_ctl *out;

        if (!w->out && !(w->out = calloc(OUT_RING, sizeof(*w->out))))
                return NULL;
        out = &w->out[w->out_at++ % OUT_RING];
        encode(out, m);
        return out;
}

int perf_tell_now(struct perf_conn *c, const struct perf_ctl *m)
{
        struct perf_worker *w = c->w;
        struct wire_ctl *out = next_out(w, m);
        int rc;

        if (!out)
                return err_set(-ENOMEM, "no memory for control messages");
        while ((rc = tp_send(c->ep, out, sizeof(*out), 0, PERF_NO_COOKIE)) == -EAGAIN)
                if ((rc = poll_once(w)) < 0)
                        return rc;
        if (rc == TP_POSTED)
                c->outstanding++;
        return rc < 0 ? rc : 0;
}

int perf_tell(struct perf_conn *c, const struct perf_ctl *m)
{
        int rc = perf_tell_now(c, m);

        return rc ? rc : perf_drain(c);
}

/* What is put before a user, and comes from somebody whom we need not trust, must not move the cursor. */
void perf_printable(char *text)
{
        for (; *text; text++)
                if (*text < ' ' || *text > '~')
                        *text = '?';
}

int perf_ctl_parse(const struct perf_worker *w, const char *peer, const void *data, size_t len, struct perf_ctl *m)
{
        static _Thread_local struct wire_ctl in;
        uint32_t version;

        memset(&in, 0, sizeof(in));
        memcpy(&in, data, len < sizeof(in) ? len : sizeof(in));
        version = le32toh(in.version);
        if (len < WIRE_HEAD || le64toh(in.magic) != CTL_MAGIC)
                return err_set(-EPROTO, "%s: %s is no djinnbench perf", w->s->phase, peer);
        in.why[sizeof(in.why) - 1] = '\0';
        perf_printable(in.why);
        if (version != CTL_VERSION && le32toh(in.kind) == PERF_REFUSED)
                return err_set(-EPERM, "%s: the other end refuses: %s", peer, in.why);
        if (version != CTL_VERSION || len != sizeof(in))
                return err_set(-EPROTO,
                               "%s: %s is another version of djinnbench perf: it speaks protocol %u, this end %d; use "
                               "the same version at both ends",
                               w->s->phase, peer, version, CTL_VERSION);
        m->kind = le32toh(in.kind);
        for (int i = 0; i < PF_COUNT; i++)
                m->f[i] = le64toh(in.f[i]);
        memcpy(m->why, in.why, sizeof(m->why));
        memcpy(m->nonce, in.nonce, sizeof(m->nonce));
        memcpy(m->proof, in.proof, sizeof(m->proof));
        memcpy(m->key.bytes, in.key, sizeof(m->key.bytes));
        memcpy(m->body, in.body, sizeof(m->body));
        return m->kind == PERF_REFUSED ? err_set(-EPERM, "%s: the other end refuses: %s", peer, m->why) : 0;
}

uint32_t perf_ctl_version(void)
{
        return CTL_VERSION;
}

int perf_hear_any(struct perf_conn *c, struct perf_ctl *m)
{
        struct perf_worker *w = c->w;
        struct tp_event ev = {.ep = c->ep};
        int rc = next_message(c, &ev);

        if (rc < 0)
                return rc;
        if (ev.kind != TP_EV_MSG)
                return err_set(-EPROTO, "%s: an immediate from %s where a control message was expected", w->s->phase,
                               ev.ep->peer);
        rc = perf_ctl_parse(w, c->ep->peer, ev.data, ev.len, m);
        tp_release(ev.ep, ev.cookie);
        return rc;
}

int perf_hear(struct perf_conn *c, enum perf_ctl_kind kind, struct perf_ctl *m)
{
        int rc = perf_hear_any(c, m);

        if (rc == 0 && m->kind != kind)
                return err_set(-EPROTO, "%s: control message %d from %s where %d was expected", c->w->s->phase,
                               (int)m->kind, c->ep->peer, (int)kind);
        return rc;
}

int perf_refuse(struct perf_conn *c, int code, const char *why)
{
        struct perf_ctl *m = calloc(1, sizeof(*m));

        if (!m)
                return err_set(-ENOMEM, "no memory for control messages");
        m->kind = PERF_REFUSED;
        snprintf(m->why, sizeof(m->why), "%.159s", why);
        perf_tell(c, m);
        code = err_set(code, "refused %s: %s", c->ep->peer, m->why);
        free(m);
        return code;
}

void perf_turn_away(struct perf_worker *w, struct tp_ep *ep, const char *why)
{
        struct perf_ctl *m = calloc(1, sizeof(*m));
        struct wire_ctl *out;

        if (m) {
                m->kind = PERF_REFUSED;
                snprintf(m->why, sizeof(m->why), "%s", why);
                out = next_out(w, m);
                if (out)
                        tp_send(ep, out, sizeof(*out), 0, PERF_NO_COOKIE);
        }
        free(m);
        tp_ep_close(ep);
}

/* ---- texts ---- */

int perf_tell_text(struct perf_conn *c, const char *text)
{
        static _Thread_local struct perf_ctl m;
        size_t len = strlen(text) + 1, at = 0;
        int rc = 0;

        memset(&m, 0, sizeof(m));
        m.kind = PERF_TEXT;
        m.f[PF_TOTAL] = len;
        for (; at < len && !rc; at += PERF_BODY) {
                memcpy(m.body, text + at, len - at < PERF_BODY ? len - at : PERF_BODY);
                rc = perf_tell(c, &m);
        }
        return rc;
}

int perf_hear_text(struct perf_conn *c, char **text)
{
        static _Thread_local struct perf_ctl m;
        uint64_t len = 1, at = 0;
        int rc = 0;

        *text = calloc(1, PERF_TEXT_MAX);
        if (!*text)
                return err_set(-ENOMEM, "no memory for a text");
        while (at < len && !rc) {
                rc = perf_hear(c, PERF_TEXT, &m);
                if (rc == 0 && (m.f[PF_TOTAL] == 0 || m.f[PF_TOTAL] > PERF_TEXT_MAX))
                        rc = err_set(-EPROTO, "%s: %s sends a text that is too long", c->w->s->phase, c->ep->peer);
                if (rc)
                        break;
                len = m.f[PF_TOTAL];
                memcpy(*text + at, m.body, len - at < PERF_BODY ? len - at : PERF_BODY);
                at += PERF_BODY;
        }
        if (rc) {
                free(*text);
                *text = NULL;
        } else {
                (*text)[len - 1] = '\0';
        }
        return rc;
}
