/* perf: the question of who listens, and its answer. The messages are those of an agreement, without what follows. */
#include "perf_probe.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "manifest.h"
#include "perf_inside.h"

static void take_words(struct perf_peer_info *info, struct perf_ctl *m)
{
        m->body[PERF_BODY - 1] = '\0';
        perf_printable((char *)m->body);
        sscanf((const char *)m->body, "%31s %47s", info->version, info->commit);
        info->needs_key = m->f[PF_KEYED] != 0;
}

static int ask(struct perf_session *s, const struct auth_key *key, struct perf_ctl *m, struct perf_peer_info *info)
{
        struct perf_conn *c = &s->conns[0];
        uint8_t nonce[NONCE_BYTES], theirs[NONCE_BYTES];
        int rc;

        memset(m, 0, sizeof(*m));
        m->kind = PERF_PROBE;
        nonce_random(nonce);
        memcpy(m->nonce, nonce, sizeof(nonce));
        if ((rc = perf_tell(c, m)) < 0 || (rc = perf_hear(c, PERF_WELCOME, m)) < 0)
                return rc;
        take_words(info, m);
        memcpy(theirs, m->nonce, sizeof(theirs));
        memset(m, 0, sizeof(*m));
        m->kind = PERF_AUTH;
        if (key && key->present)
                auth_prove(key, AUTH_CLIENT, nonce, theirs, m->proof);
        if ((rc = perf_tell(c, m)) < 0 || (rc = perf_hear(c, PERF_AUTHED, m)) < 0)
                return rc;
        info->key_agrees = info->needs_key && key && key->present && m->f[PF_SEEN] &&
                           auth_check(key, AUTH_SERVER, nonce, theirs, m->proof);
        return 0;
}

int perf_probe(struct tp_ctx *ctx, const char *url, const struct auth_key *key, uint64_t deadline_ns,
               struct perf_peer_info *info)
{
        static const struct perf_opts opts = {.stall_ns = 10 * NS_PER_S};
        struct perf_ctl *m = malloc(sizeof(*m));
        struct perf_session s;
        uint64_t now = clock_ns();
        int rc = perf_session_init(&s, &opts, true);

        memset(info, 0, sizeof(*info));
        if (!m)
                rc = err_set(-ENOMEM, "no memory for control messages");
        s.phase = "asking who listens";
        s.stall_ns = deadline_ns > now ? deadline_ns - now : 1;
        rc = rc ? rc : tp_connect(ctx, url, deadline_ns, &s.conns[0].ep);
        if (!rc) {
                s.workers[0].ctx = ctx;
                s.conns[0].ep->user = &s.conns[0];
                snprintf(s.peer, sizeof(s.peer), "%s", s.conns[0].ep->peer);
                tp_attr(s.conns[0].ep, &info->attr);
                info->ctl_version = perf_ctl_version();
                rc = ask(&s, key, m, info);
                if (rc == -EPERM && strstr(err_text(), PERF_BUSY)) {
                        info->busy = true;
                        rc = 0;
                }
                s.workers[0].ctx = NULL; /* the caller's */
        }
        perf_session_free(&s);
        free(m);
        return rc;
}

/* The listening end. */
int perf_probe_answer(struct perf_conn *c, const struct auth_key *key, struct perf_ctl *m)
{
        uint8_t theirs[NONCE_BYTES], nonce[NONCE_BYTES];
        bool agrees;
        int rc;

        memcpy(theirs, m->nonce, sizeof(theirs));
        nonce_random(nonce);
        memset(m, 0, sizeof(*m));
        m->kind = PERF_WELCOME;
        memcpy(m->nonce, nonce, sizeof(nonce));
        m->f[PF_KEYED] = key->present;
        snprintf((char *)m->body, PERF_BODY, "%s %s", manifest_version(), manifest_commit());
        if ((rc = perf_tell(c, m)) < 0 || (rc = perf_hear(c, PERF_AUTH, m)) < 0)
                return rc;
        agrees = key->present && auth_check(key, AUTH_CLIENT, theirs, nonce, m->proof);
        memset(m, 0, sizeof(*m));
        m->kind = PERF_AUTHED;
        m->f[PF_SEEN] = agrees;
        if (agrees)
                auth_prove(key, AUTH_SERVER, theirs, nonce, m->proof);
        rc = perf_tell(c, m);
        return rc ? rc : err_set(-EALREADY, "%s only asked who listens here", c->ep->peer);
}
