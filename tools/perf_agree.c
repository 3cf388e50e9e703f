/*
 * perf: what two ends settle before they measure.
 *
 *   driver                               peer
 *   HELLO configuration, nonce    ->     refused unless what was given here is the same
 *                                 <-     WELCOME nonce
 *   AUTH proof                    ->
 *                                 <-     AUTHED proof, token
 *   TEXT manifest                 ->
 *                                 <-     TEXT manifest, TEXT addresses of its threads
 *   ATTACH token, index, key      ->     on every connection, the first one included
 *                                 <-     ATTACHED key
 *                                 <-     TOGETHER
 *
 * Whoever refuses tells the other end why, and says so at its own end.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "perf_inside.h"

#define GRACE_NS       (1 * NS_PER_S)
#define GRACE_LATER_NS (5 * NS_PER_S)
#define STRANGER_NS    (5 * NS_PER_S) /* how long each word of somebody may take who has not shown that he has the key */

/* ---- the driver ---- */

/* Away, just going away, or busy with somebody else: worth another try. */
static bool worth_it(const struct perf_opts *o, int rc)
{
        return rc == -ECONNREFUSED || rc == -ECONNRESET || rc == -EPIPE || rc == -ENOTCONN ||
               (rc == -ETIMEDOUT && o->wait_s) || (rc == -EPERM && strstr(err_text(), PERF_BUSY));
}

static int connect_first(struct perf_session *s)
{
        struct perf_conn *c = &s->conns[0];
        int rc = tp_connect(s->workers[0].ctx, s->url, clock_ns() + s->stall_ns, &c->ep);

        if (rc < 0)
                return rc;
        c->ep->user = c;
        snprintf(s->peer, sizeof(s->peer), "%s", c->ep->peer);
        tp_attr(c->ep, &s->attr);
        return 0;
}

static void disconnect_first(struct perf_session *s)
{
        if (s->conns[0].ep)
                tp_ep_close(s->conns[0].ep);
        s->conns[0].ep = NULL;
        s->conns[0].outstanding = 0;
        s->workers[0].queue_n = 0;
}

static void fill_hello(struct perf_session *s, const struct perf_launch *l, struct perf_ctl *m)
{
        const struct perf_opts *o = s->o;

        memset(m, 0, sizeof(*m));
        m->kind = PERF_HELLO;
        memcpy(m->f, o->config, sizeof(o->config));
        m->f[PF_TX_BYTES] = s->tx_bytes;
        m->f[PF_RX_BYTES] = s->rx_bytes;
        m->f[PF_KEYED] = o->key.present;
        m->f[PF_STALL] = s->stall_ns;
        m->f[PF_LAST] = l->last;
        nonce_random(m->nonce);
}

static int drive_auth(struct perf_session *s, const struct perf_launch *l, struct perf_ctl *m)
{
        const struct auth_key *key = &s->o->key;
        struct perf_conn *c = &s->conns[0];
        uint8_t nonce[NONCE_BYTES], theirs[NONCE_BYTES];
        int rc;

        fill_hello(s, l, m);
        memcpy(nonce, m->nonce, sizeof(nonce));
        if ((rc = perf_tell(c, m)) < 0 || (rc = perf_hear(c, PERF_WELCOME, m)) < 0)
                return rc;
        memcpy(theirs, m->nonce, sizeof(theirs));
        memset(m, 0, sizeof(*m));
        m->kind = PERF_AUTH;
        if (key->present)
                auth_prove(key, AUTH_CLIENT, nonce, theirs, m->proof);
        if ((rc = perf_tell(c, m)) < 0 || (rc = perf_hear(c, PERF_AUTHED, m)) < 0)
                return rc;
        if (key->present && !auth_check(key, AUTH_SERVER, nonce, theirs, m->proof))
                return perf_refuse(c, -EPERM, "the keys differ: the listening end does not hold the connecting end's");
        s->token[0] = m->f[PF_TOKEN_0];
        s->token[1] = m->f[PF_TOKEN_1];
        return 0;
}

/* Texts that describe this end; the other one's is kept. */
static int tell_host(struct perf_session *s)
{
        json *host = perf_host(s);
        char *text = json_text(host, false);
        int rc = text && strlen(text) < PERF_TEXT_MAX ? perf_tell_text(&s->conns[0], text)
                                                      : perf_tell_text(&s->conns[0], "{}");

        free(text);
        json_free(host);
        return rc;
}

static int hear_addresses(struct perf_session *s)
{
        char *text, *save = NULL, *line;
        int rc = perf_hear_text(&s->conns[0], &text);

        if (rc < 0)
                return rc;
        line = strtok_r(text, "\n", &save);
        for (unsigned i = 1; i < s->n_workers && !rc; i++, line = strtok_r(NULL, "\n", &save)) {
                if (!line)
                        rc = err_set(-EPROTO, "%s: %s has not as many threads as were agreed on", s->phase, s->peer);
                else
                        snprintf(s->workers[i].url, sizeof(s->workers[i].url), "%s", line);
        }
        free(text);
        return rc;
}

static void choose_cores(struct perf_session *s)
{
        s->n_cores = perf_cores(s->o, s->driver, s->attr.numa, s->n_workers, s->cores);
        perf_pin(s->n_cores ? s->cores[0] : -1);
}

/* A listener that takes one driver after another is away for a moment in between. */
static int reach(struct perf_session *s, const struct perf_launch *l, struct perf_ctl *m)
{
        uint64_t grace = l->index ? GRACE_LATER_NS : GRACE_NS, wait = (uint64_t)s->o->wait_s * NS_PER_S;
        uint64_t until = clock_ns() + (wait > grace ? wait : grace);
        int rc;

        for (;;) {
                s->phase = "connecting";
                rc = connect_first(s);
                s->phase = "agreeing on the measurement";
                rc = rc ? rc : drive_auth(s, l, m);
                if (!worth_it(s->o, rc) || clock_ns() >= until || perf_stopped)
                        return rc;
                disconnect_first(s);
                clock_nanosleep(CLOCK_MONOTONIC, 0, &(struct timespec){.tv_nsec = 10 * NS_PER_MS}, NULL);
        }
}

int perf_agree_drive(struct perf_session *s, const struct perf_launch *l)
{
        const struct perf_opts *o = s->o;
        struct perf_ctl *m;
        int rc = perf_worker_open(&s->workers[0], s->url);

        if (rc < 0)
                return rc;
        s->tx_bytes = s->rx_bytes = perf_slots_bytes(o, l->size);
        rc = perf_session_share(s, (unsigned)o->connections, (unsigned)o->threads, (unsigned)o->depth);
        m = rc ? NULL : calloc(1, sizeof(*m));
        if (!m)
                return rc ? rc : err_set(-ENOMEM, "no memory for control messages");
        rc = reach(s, l, m);
        if (rc == 0)
                choose_cores(s);
        rc = rc ? rc : tell_host(s);
        rc = rc ? rc : perf_hear_text(&s->conns[0], &s->peer_text);
        rc = rc ? rc : hear_addresses(s);
        s->phase = "making the connections";
        rc = rc ? rc : perf_parallel(s, perf_conns_make);
        rc = rc ? rc : perf_hear(&s->conns[0], PERF_TOGETHER, m);
        free(m);
        if (rc == 0)
                s->path = s->conns[0].rx_mem->path;
        return rc;
}

/* ---- the peer ---- */

/* The listening end holds to what was on its own command line, and takes the driver's word for the rest. */
static int check_config(struct perf_conn *c, const struct perf_opts *o, const struct perf_ctl *hello)
{
        char why[160], here[40], there[40];

        for (int i = 0; i < PF_CONFIG; i++) {
                if (!(o->config_given & 1u << i) || o->config[i] == hello->f[i])
                        continue;
                if (i == PF_SIZES)
                        snprintf(why, sizeof(why), "%s differs: both ends were given lists of their own",
                                 perf_config_names[i]);
                else
                        snprintf(why, sizeof(why), "%s differs: the listening end has %s, the connecting end %s",
                                 perf_config_names[i], perf_config_text(i, o->config[i], here, sizeof(here)),
                                 perf_config_text(i, hello->f[i], there, sizeof(there)));
                return perf_refuse(c, -EPERM, why);
        }
        if (o->key.present != (hello->f[PF_KEYED] != 0))
                return perf_refuse(c, -EPERM,
                                   o->key.present ? "this end wants a key (--key-file)"
                                                  : "this end has no key (--key-file)");
        return 0;
}

/* Numbers from outside: what would ask for too much is refused before anything is made. */
static int check_bounds(struct perf_conn *c, const struct perf_ctl *hello)
{
        uint64_t conns = hello->f[PF_CONNECTIONS], threads = hello->f[PF_THREADS], tx = hello->f[PF_TX_BYTES],
                 rx = hello->f[PF_RX_BYTES];

        if (conns == 0 || conns > PERF_CONNS_MAX || threads == 0 || threads > PERF_THREADS_MAX || threads > conns ||
            hello->f[PF_DEPTH] == 0 || hello->f[PF_DEPTH] > PERF_DEPTH_MAX)
                return perf_refuse(c, -EPERM, "more connections, threads or depth are asked for than this end gives");
        if (tx == 0 || rx == 0 || tx > PERF_REGION_MAX || rx > PERF_REGION_MAX || tx * conns > 2 * PERF_REGION_MAX ||
            rx * conns > 2 * PERF_REGION_MAX)
                return perf_refuse(c, -EPERM, "more memory is asked for than this end gives");
        if (hello->f[PF_STALL] < NS_PER_MS || hello->f[PF_STALL] > 86400 * NS_PER_S)
                return perf_refuse(c, -EPERM, "a deadline (--stall) that makes no sense");
        return 0;
}

static int serve_auth(struct perf_session *s, const uint8_t theirs[NONCE_BYTES], struct perf_ctl *m)
{
        const struct auth_key *key = &s->o->key;
        struct perf_conn *c = &s->conns[0];
        uint8_t nonce[NONCE_BYTES];
        int rc;

        nonce_random(nonce);
        memset(m, 0, sizeof(*m));
        m->kind = PERF_WELCOME;
        memcpy(m->nonce, nonce, sizeof(nonce));
        if ((rc = perf_tell(c, m)) < 0 || (rc = perf_hear(c, PERF_AUTH, m)) < 0)
                return rc;
        if (key->present && !auth_check(key, AUTH_CLIENT, theirs, nonce, m->proof))
                return perf_refuse(c, -EPERM, "the keys differ");
        memset(m, 0, sizeof(*m));
        m->kind = PERF_AUTHED;
        if (key->present)
                auth_prove(key, AUTH_SERVER, theirs, nonce, m->proof);
        nonce_random(nonce);
        memcpy(s->token, nonce, sizeof(s->token));
        m->f[PF_TOKEN_0] = s->token[0];
        m->f[PF_TOKEN_1] = s->token[1];
        return perf_tell(c, m);
}

static int tell_addresses(struct perf_session *s)
{
        static char text[PERF_THREADS_MAX * TP_URL_MAX];
        size_t at = 0;

        text[0] = '\0';
        for (unsigned i = 1; i < s->n_workers; i++)
                at += (size_t)snprintf(text + at, sizeof(text) - at, "%s\n", s->workers[i].url);
        return perf_tell_text(&s->conns[0], text);
}

static int serve_together(struct perf_session *s, struct perf_ctl *m)
{
        int rc = perf_hear_text(&s->conns[0], &s->peer_text);

        choose_cores(s);
        rc = rc ? rc : tell_host(s);
        rc = rc ? rc : perf_parallel(s, perf_thread_listen);
        rc = rc ? rc : tell_addresses(s);
        s->phase = "making the connections";
        rc = rc ? rc : perf_parallel(s, perf_conns_take);
        if (rc)
                return rc;
        s->path = s->conns[0].rx_mem->path;
        memset(m, 0, sizeof(*m));
        m->kind = PERF_TOGETHER;
        return perf_tell(&s->conns[0], m);
}

static int hear_hello(struct perf_session *s, struct perf_ctl *m)
{
        struct perf_conn *c = &s->conns[0];
        int rc = perf_hear_any(c, m);

        if (rc == 0 && m->kind == PERF_PROBE)
                return perf_probe_answer(c, &s->o->key, m);
        if (rc == 0 && m->kind != PERF_HELLO)
                rc = err_set(-EPROTO, "%s: control message %d from %s where a driver's first was expected", s->phase,
                             (int)m->kind, s->peer);
        if (rc == -EPROTO) { /* whatever it is, it may understand this */
                char why[160];

                snprintf(why, sizeof(why), "%.159s", err_text());
                return perf_refuse(c, -EPROTO, why);
        }
        if (rc < 0 || (rc = check_config(c, s->o, m)) < 0)
                return rc;
        return check_bounds(c, m);
}

/* Only from now on the driver's word is worth time and memory. */
static int take_terms(struct perf_session *s, const struct perf_ctl *hello)
{
        s->stall_ns = hello->f[PF_STALL];
        s->tx_bytes = hello->f[PF_TX_BYTES];
        s->rx_bytes = hello->f[PF_RX_BYTES];
        s->last = hello->f[PF_LAST] != 0;
        return perf_session_share(s, (unsigned)hello->f[PF_CONNECTIONS], (unsigned)hello->f[PF_THREADS],
                                  (unsigned)hello->f[PF_DEPTH]);
}

static int accept_first(struct perf_session *s)
{
        struct perf_worker *w = &s->workers[0];
        struct perf_conn *c = &s->conns[0];
        int rc;

        s->phase = "waiting for a driver";
        while ((rc = tp_accept(w->tl, &c->ep)) == -EAGAIN) {
                struct tp_event ev;

                rc = perf_stopped ? err_set(-EINTR, "ended by a signal while nobody had connected")
                                  : tp_wait(w->ctx, &ev, 1, clock_ns() + 20 * NS_PER_MS);
                rc = rc > 0 ? perf_take(w, &ev) : rc; /* somebody whom an earlier driver left behind */
                if (rc < 0)
                        return rc;
        }
        if (rc < 0)
                return rc;
        c->ep->user = c;
        snprintf(s->peer, sizeof(s->peer), "%s", c->ep->peer);
        tp_attr(c->ep, &s->attr);
        return 0;
}

int perf_agree_serve(struct perf_session *s, struct tp_ctx *ctx, struct tp_listener *tl)
{
        struct perf_ctl *m = calloc(2, sizeof(*m)), *hello = m + 1;
        int rc;

        if (!m)
                return err_set(-ENOMEM, "no memory for control messages");
        s->workers[0].ctx = ctx;
        s->workers[0].tl = tl;
        rc = accept_first(s);
        s->phase = "agreeing on the measurement";
        s->stall_ns = s->stall_ns < STRANGER_NS ? s->stall_ns : STRANGER_NS;
        rc = rc ? rc : hear_hello(s, hello);
        rc = rc ? rc : serve_auth(s, hello->nonce, m);
        rc = rc ? rc : take_terms(s, hello);
        if (rc == 0) {
                rc = serve_together(s, m);
                if (rc == -ENOMEM || rc == -EADDRINUSE || rc == -EPROTO || rc == -EINVAL) { /* the driver is to know */
                        char why[160];

                        snprintf(why, sizeof(why), "%.159s", err_text());
                        perf_refuse(&s->conns[0], rc, why);
                        err_set(rc, "%s", why);
                }
        }
        free(m);
        return rc;
}
