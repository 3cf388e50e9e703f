/*
 * Connections and sessions. A connection is a stranger until it has proven the key (or both sides have agreed to do
 * without): it gets one answer to HELLO, a deadline, and a bounded number of places. A session is what AUTH makes; it
 * ends with its first connection, and everything that it held goes with it.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "err.h"
#include "inside.h"
#include "log.h"
#include "manifest.h"

/* ---- requests ---- */

struct request *srv_request_new(struct conn *c)
{
        struct request *r = c->free;
        uint32_t max = c->state == CONN_OPEN ? SRV_REQUESTS : 2;

        if (r) {
                c->free = r->next;
                r->next = NULL;
                c->busy++;
                return r;
        }
        if (c->nrequests >= max)
                return NULL;
        r = calloc(1, sizeof(*r));
        /* Zeroed: replies are sent from here, and what lies behind their fields must not be somebody else's. */
        if (r)
                r->frame = calloc(1, ALIGN_UP(c->attr.msg_max, (size_t)CACHE_LINE));
        if (!r || !r->frame) {
                free(r);
                return NULL;
        }
        r->c = c;
        c->all[c->nrequests++] = r;
        c->busy++;
        return r;
}

/* Only what the next use reads before it writes is put back: this runs after every request. */
void srv_request_rest(struct server *srv, struct request *r)
{
        struct conn *c = r->c;

        BUG_ON(r->m || r->posts);
        if (r->ends_conn)
                srv_conn_end(srv, c, "refused");
        r->engine = r->is_call = r->cancelled = r->ends_conn = r->in_region = false;
        r->stuck_ns = 0;
        r->stage = ST_REST;
        r->next = c->free;
        c->free = r;
        c->busy--;
}

static void request_free(struct request *r)
{
        if (r->digest)
                (void)digest_end(r->digest);
        serial_call_free(&r->call);
        free(r->frame);
        free(r->body);
        free(r->each);
        free(r->blobs);
        free(r);
}

void srv_answer(struct server *srv, struct request *r, enum msg_opcode op, void *reply, size_t len, uint32_t flags)
{
        msg_header_init(reply, op, len, flags, r->id);
        r->reply = reply;
        r->reply_len = len;
        r->stage = ST_REPLY;
}

void srv_refuse(struct server *srv, struct request *r, int rc, enum msg_phase phase, uint16_t field, uint32_t flags)
{
        struct msg_error *e = (struct msg_error *)r->frame;
        char text[sizeof(e->text)];

        snprintf(text, sizeof(text), "%s", err_str(rc));
        log_debug("%s: %s: %s", r->c->ep->peer, msg_phase_names[phase], text);
        *e = (struct msg_error){.code = rc, .phase = (uint16_t)phase, .field = field};
        memcpy(e->text, text, sizeof(text));
        srv_answer(srv, r, MSG_ERROR, e, sizeof(*e), flags);
        err_clear();
        if (!(flags & MSG_FATAL))
                return;
        r->ends_conn = true;
        if (r->c->state == CONN_LEAVING || r->c->state == CONN_DEAD)
                return;
        srv->nleaving++;
        r->c->state = CONN_LEAVING;
        r->c->deadline_ns = clock_ns() + SRV_LAST_WORD_NS;
}

/* ---- memory ---- */

int srv_session_charge(struct session *s, uint64_t bytes, const char *what)
{
        uint64_t limit = s->srv->opts.memory_bytes;

        if (bytes > limit - s->memory_used)
                return err_set(-EDQUOT, "%llu bytes for %s: this session holds %llu of the %llu that it may",
                               (unsigned long long)bytes, what, (unsigned long long)s->memory_used,
                               (unsigned long long)limit);
        s->memory_used += bytes;
        return 0;
}

void srv_session_refund(struct session *s, uint64_t bytes)
{
        BUG_ON(bytes > s->memory_used);
        s->memory_used -= bytes;
}

int srv_total_charge(struct server *srv, uint64_t bytes, const char *what)
{
        uint64_t limit = srv->opts.memory_total_bytes;

        if (bytes > limit - srv->memory_used)
                return err_set(-EDQUOT, "%llu bytes for %s: the sessions of this server hold %llu of its %llu",
                               (unsigned long long)bytes, what, (unsigned long long)srv->memory_used,
                               (unsigned long long)limit);
        srv->memory_used += bytes;
        return 0;
}

void srv_total_refund(struct server *srv, uint64_t bytes)
{
        BUG_ON(bytes > srv->memory_used);
        srv->memory_used -= bytes;
}

int srv_charge(struct session *s, uint64_t bytes, const char *what)
{
        int rc = srv_session_charge(s, bytes, what);

        if (rc < 0)
                return rc;
        rc = srv_total_charge(s->srv, bytes, what);
        if (rc < 0)
                srv_session_refund(s, bytes);
        return rc;
}

void srv_refund(struct session *s, uint64_t bytes)
{
        srv_session_refund(s, bytes);
        srv_total_refund(s->srv, bytes);
}

int srv_grow(struct conn *c, struct tp_mem **mem, size_t len, const char *what)
{
        size_t old = *mem ? (*mem)->region.len : 0;
        struct tp_mem *grown;
        int rc;

        if (len <= old && *mem)
                return 0;
        if (len > SIZE_MAX - 4096)
                return err_set(-EDQUOT, "%zu bytes for %s are more than anybody has", len, what);
        len = len ? ALIGN_UP(len, (size_t)4096) : 4096;
        rc = srv_charge(c->s, len, what);
        if (rc < 0)
                return rc;
        rc = tp_alloc(c->ep, len, &grown);
        if (rc < 0) {
                srv_refund(c->s, len);
                return rc;
        }
        if (*mem) {
                tp_free(*mem);
                srv_refund(c->s, old);
        }
        *mem = grown;
        return 0;
}

/* ---- connections ---- */

/* The newest connection is first in the list. */
static struct conn *oldest_stranger(const struct server *srv)
{
        struct conn *oldest = NULL;

        for (struct conn *c = srv->conns; c; c = c->next) {
                if (!c->s)
                        oldest = c;
        }
        return oldest;
}

/* Too many strangers: the one goes that has been silent for longest, so that a crowd that says nothing does not keep
 * out whoever has the key. Not to be called while events are handled. */
int srv_conn_add(struct server *srv, struct tp_ep *ep, bool loopback)
{
        struct conn *c;

        if (srv->nstrangers >= SRV_STRANGERS) {
                c = oldest_stranger(srv);
                srv_conn_end(srv, c, "no handshake, and others are waiting");
                srv_conn_reap(srv, c);
        }
        c = calloc(1, sizeof(*c));
        if (!c) {
                tp_ep_close(ep);
                return -ENOMEM;
        }
        c->ep = ep;
        c->loopback = loopback;
        c->deadline_ns = clock_ns() + SRV_HANDSHAKE_NS;
        tp_attr(ep, &c->attr);
        ep->user = c;
        c->next = srv->conns;
        srv->conns = c;
        srv->nstrangers++;
        return 0;
}

void srv_conn_end(struct server *srv, struct conn *c, const char *why)
{
        if (c->state == CONN_DEAD)
                return;
        srv->nleaving -= c->state == CONN_LEAVING;
        snprintf(c->why, sizeof(c->why), "%s", why);
        c->state = CONN_DEAD;
        srv->reap = true;
}

/* What a connection's session has been charged for it: its buffers, and those of its requests. */
static void conn_refund(const struct conn *c)
{
        const struct tp_mem *const buffers[] = {c->staging, c->shadow, c->out};

        for (size_t i = 0; i < ARRAY_LEN(buffers); i++) {
                if (buffers[i])
                        srv_refund(c->s, buffers[i]->region.len);
        }
        for (uint32_t i = 0; i < c->nrequests; i++)
                srv_refund(c->s, c->all[i]->body_cap + c->all[i]->each_cap + c->all[i]->blobs_cap);
}

/* Takes c off the server and frees it; its memory, keys and imported regions end with its endpoint. */
static void conn_free(struct server *srv, struct conn *c)
{
        struct conn **p = &srv->conns;

        while (*p != c)
                p = &(*p)->next;
        *p = c->next;
        if (c->s)
                conn_refund(c);
        else
                srv->nstrangers--;
        log_debug("%s: connection ended: %s", c->ep->peer, c->why);
        tp_ep_close(c->ep);
        for (uint32_t i = 0; i < c->nrequests; i++)
                request_free(c->all[i]);
        while (c->regs) {
                struct conn_reg *next = c->regs->next;

                free(c->regs);
                c->regs = next;
        }
        free(c);
}

static void session_end(struct server *srv, struct session *s)
{
        struct session **p = &srv->sessions;

        for (struct conn *c = s->conns; c; c = c->sibling)
                srv_forget(srv, c);
        for (struct conn *c = s->conns, *next; c; c = next) {
                next = c->sibling;
                conn_free(srv, c);
        }
        s->home = s->conns = NULL;
        for (unsigned i = 0; i < SRV_MODELS; i++) {
                if (s->models[i])
                        srv_model_free(srv, s->models[i]);
        }
        while (*p != s)
                p = &(*p)->next;
        *p = s->next;
        srv->nsessions--;
        srv_refund(s, s->memory_used);
        free(s->load);
        free(s->local);
        free(s);
}

void srv_conn_reap(struct server *srv, struct conn *c)
{
        struct conn **p;

        if (c->s && c->s->home == c) {
                session_end(srv, c->s);
                return;
        }
        srv_forget(srv, c);
        if (c->s) {
                p = &c->s->conns;
                while (*p != c)
                        p = &(*p)->sibling;
                *p = c->sibling;
                c->s->nconns--;
        }
        conn_free(srv, c);
}

/* ---- handshake ---- */

static void join_session(struct server *srv, struct session *s, struct conn *c)
{
        c->s = s;
        c->state = CONN_OPEN;
        c->sibling = s->conns;
        s->conns = c;
        s->nconns++;
        srv->nstrangers--;
}

int srv_hello(struct server *srv, struct request *r)
{
        struct msg_hello *m = (struct msg_hello *)r->frame;
        struct conn *c = r->c;
        bool insecure = m->h.flags & HELLO_INSECURE, has_key = srv->opts.key.present;

        if (m->version_min > MSG_VERSION || m->version_max < MSG_VERSION)
                return err_set(-EPROTO, "protocol versions %u to %u: this server speaks %u", m->version_min,
                               m->version_max, MSG_VERSION);
        if (!has_key && m->needs_key)
                return err_set(-EACCES, "you demand a key and this server has none: start it with --key-file");
        if (!has_key && !c->loopback && !(srv->opts.insecure && insecure))
                return err_set(-EACCES, "off loopback both sides need the same key (--key-file or DJINN_KEY_FILE), or "
                                        "both must say --insecure");
        memcpy(c->nonce_c, m->nonce, NONCE_BYTES);
        nonce_random(c->nonce_s);
        c->state = CONN_GREETED;
        memcpy(m->nonce, c->nonce_s, NONCE_BYTES);
        m->version_min = m->version_max = MSG_VERSION;
        m->needs_key = has_key;
        srv_answer(srv, r, MSG_HELLO, m, sizeof(*m), 0);
        return 0;
}

static int session_new(struct server *srv, struct conn *c, struct session **out)
{
        uint8_t noise[NONCE_BYTES];
        struct session *s;

        if (srv->nsessions >= srv->opts.sessions_max)
                return err_set(-EBUSY, "this server has its %u sessions; try again later", srv->opts.sessions_max);
        s = calloc(1, sizeof(*s));
        if (!s)
                return err_set(-ENOMEM, "no memory for a session");
        nonce_random(noise);
        memcpy(&s->id, noise, 8);
        memcpy(s->secret, noise + 8, 16);
        s->srv = srv;
        s->home = c;
        s->next = srv->sessions;
        srv->sessions = s;
        srv->nsessions++;
        srv->served = true;
        join_session(srv, s, c);
        *out = s;
        return 0;
}

static void auth_reply(struct server *srv, struct request *r, const struct session *s)
{
        struct msg_auth_reply *a = (struct msg_auth_reply *)r->frame;
        size_t room = r->c->attr.msg_max - sizeof(struct msg_run);

        *a = (struct msg_auth_reply){
            .session_id = s->id,
            .join_secret = {s->secret[0], s->secret[1]},
            .boot_id = {srv->boot_id[0], srv->boot_id[1]},
            .limits = {.memory_bytes = srv->opts.memory_bytes,
                       .flop_per_request = (uint64_t)srv->opts.flop_per_request,
                       .inflight = SRV_INFLIGHT,
                       .inline_bytes = (uint32_t)(room < SRV_INLINE_MAX ? room : SRV_INLINE_MAX),
                       .models = SRV_MODELS,
                       .regions = SRV_REGIONS},
            .threads = (uint32_t)srv->props.threads,
            .pid = (uint32_t)getpid(),
            .rss_bytes = srv_rss_bytes(),
            .read_bytes_per_s = srv->props.read_bytes_per_s,
            .flop_per_s = srv->props.flop_per_s[DT_F32],
            .cache_bytes_per_s = srv->props.cache_bytes_per_s,
            .cache_bytes = srv->props.cache_bytes};
        if (srv->opts.key.present)
                auth_prove(&srv->opts.key, AUTH_SERVER, r->c->nonce_c, r->c->nonce_s, a->proof);
        snprintf(a->device, sizeof(a->device), "%s", srv->props.name);
        snprintf(a->library, sizeof(a->library), "%s", srv->props.library);
        snprintf(a->commit, sizeof(a->commit), "%s", manifest_commit());
        srv_answer(srv, r, MSG_AUTH, a, sizeof(*a), 0);
}

/* Where there is no room for it now, nothing is lost: the limits in AUTH have said the same. */
void srv_credit(struct conn *c)
{
        c->credit = (struct msg_credit){.inflight = SRV_INFLIGHT};
        msg_header_init(&c->credit.h, MSG_CREDIT, sizeof(c->credit), 0, 0);
        (void)tp_send(c->ep, &c->credit, sizeof(c->credit), 0, 0);
}

int srv_auth(struct server *srv, struct request *r)
{
        const struct msg_auth *m = (const struct msg_auth *)r->frame;
        struct session *s = NULL;
        int rc;

        if (r->len != sizeof(*m))
                return err_set(-EPROTO, "refused");
        if (srv->opts.key.present && !auth_check(&srv->opts.key, AUTH_CLIENT, r->c->nonce_c, r->c->nonce_s, m->proof))
                return err_set(-EACCES, "refused");
        rc = session_new(srv, r->c, &s);
        if (rc < 0)
                return rc;
        auth_reply(srv, r, s);
        return 0;
}

/* Whether somebody who knows only one of them finds out how much of it is right: no. */
static bool same_secret(const uint64_t a[2], const uint64_t b[2])
{
        return ((a[0] ^ b[0]) | (a[1] ^ b[1])) == 0;
}

int srv_join(struct server *srv, struct request *r)
{
        struct msg_join *m = (struct msg_join *)r->frame;

        for (struct session *s = srv->sessions; s; s = s->next) {
                if (s->id != m->session_id || !same_secret(s->secret, m->join_secret))
                        continue;
                if (s->nconns >= SRV_CONNS)
                        return err_set(-EBUSY, "this session has its %u connections", SRV_CONNS);
                join_session(srv, s, r->c);
                srv_answer(srv, r, MSG_JOIN, m, sizeof(*m), 0);
                return 0;
        }
        return err_set(-EACCES, "refused");
}
