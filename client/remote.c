/* Messages of the protocol from the client's side. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "err.h"
#include "manifest.h"
#include "remote.h"

#define EVENTS_MAX    16
#define CLOCK_SAMPLES 64
#define CLOCK_FOLLOW  8            /* before and after each row of a block */
#define STAMP_MAX_NS  (1ull << 60) /* 36 years after boot: differences of stamps fit */
#define CLOCK_CHECK   256          /* empty polls between looks at the clock */

/* ---- waiting ---- */

static int down(struct remote *r, int status)
{
        r->dead = status ? status : -ECONNRESET;
        snprintf(r->why, sizeof r->why, "%s", *err_text() ? err_text() : "the connection ended");
        return err_set(r->dead, "%s: the server is gone: %s", r->url, r->why);
}

/* Copies a message into the inbox and gives the loan back. */
static int keep(struct remote *r, const struct tp_event *ev)
{
        r->inbox_len = ev->len;
        memcpy(r->inbox, ev->data, ev->len);
        tp_release(r->ep, ev->cookie);
        return 1;
}

/* One look at the transport: 1 a message was kept, 0 nothing, -errno the connection is down. One event at a time, so that
 * what follows an answer stays in the transport. */
static int poll_once(struct remote *r)
{
        struct tp_event ev;

        if (tp_poll(r->ctx, &ev, 1) <= 0)
                return 0;
        switch (ev.kind) {
        case TP_EV_MSG:
                return keep(r, &ev);
        case TP_EV_DOWN:
                return down(r, ev.status);
        case TP_EV_DONE:
                return ev.status < 0 ? down(r, ev.status) : 0;
        case TP_EV_IMM:
                break;
        }
        return 0;
}

/* Whose answer is still to come cannot be asked anything else: the connection is given up, for all rows over it. */
static int timed_out(struct remote *r, const char *what)
{
        r->dead = -ETIMEDOUT;
        snprintf(r->why, sizeof r->why, "no %s within %.1f s; is it stopped or overloaded?", what,
                 (double)r->opts.timeout_ns / (double)NS_PER_S);
        return err_set(-ETIMEDOUT, "%s: the server is gone: %s", r->url, r->why);
}

static int error_answer(struct remote *r)
{
        const struct msg_error *e = (const void *)r->inbox;

        return err_set(e->code < 0 ? e->code : -EPROTO, "%s: the server refused (%s): %s", r->url,
                       e->phase < PH_COUNT ? msg_phase_names[e->phase] : "?", e->text);
}

/* A kept message is the answer (1), something to be passed over (0), or an error. A LOAD has an id per part, and each of
 * them may be what the server refuses; what is older was asked by somebody who did not wait for the answer. */
static int judge(struct remote *r, enum msg_opcode opcode, uint64_t request_id)
{
        const struct msg_header *h = (const void *)r->inbox;
        uint64_t since = r->load_since && r->load_since < request_id ? r->load_since : request_id;
        int rc = msg_check(r->inbox, r->inbox_len);

        if (rc < 0)
                return err_trail(rc, "in an answer from %s", r->url);
        if (h->opcode == MSG_HEARTBEAT || h->opcode == MSG_CREDIT)
                return 0;
        if (h->opcode == MSG_BYE)
                return err_set(-ECONNRESET, "%s: the server said good-bye", r->url);
        if (h->opcode == MSG_ERROR && (h->flags & MSG_FATAL))
                return error_answer(r);
        if (h->request_id < since)
                return 0;
        if (h->opcode == MSG_ERROR && h->request_id <= request_id)
                return error_answer(r);
        if (h->opcode != opcode || h->request_id != request_id)
                return err_set(-EPROTO, "%s: expected %s for request %llu, got %s for %llu", r->url,
                               msg_opcode_name(opcode), (unsigned long long)request_id, msg_opcode_name(h->opcode),
                               (unsigned long long)h->request_id);
        return 1;
}

int remote_answer(struct remote *r, enum msg_opcode opcode, uint64_t request_id, uint64_t *arrived_ns)
{
        uint64_t start = clock_ns();

        for (unsigned idle = 1;; idle++) {
                int rc = poll_once(r);

                if (__builtin_expect(rc > 0, 0)) {
                        if (arrived_ns)
                                *arrived_ns = clock_ns();
                        rc = judge(r, opcode, request_id);
                        if (rc)
                                return rc < 0 ? rc : 0;
                        start = clock_ns();
                }
                if (rc < 0)
                        return rc;
                if (idle % CLOCK_CHECK)
                        continue;
                if (clock_ns() - start > r->opts.timeout_ns)
                        return timed_out(r, msg_opcode_name(opcode));
                if (r->stop && *r->stop)
                        return err_set(-EINTR, "interrupted");
        }
}

/* ---- posting ---- */

/* After -EAGAIN: make room by polling; a message that arrives meanwhile can only be a mistake of the server's or
 * its last words, and is judged as an answer to what is being posted, whose id was the last to be given. */
static int make_room(struct remote *r, uint64_t start)
{
        int rc = poll_once(r);

        if (rc > 0)
                rc = judge(r, MSG_HEARTBEAT, r->next_id - 1);
        if (rc < 0)
                return rc;
        if (clock_ns() - start > r->opts.timeout_ns)
                return timed_out(r, "room to send");
        return 0;
}

int remote_write(struct remote *r, const void *src, size_t len, struct tp_rmem *to, uint64_t off)
{
        uint64_t start = 0;
        int rc;

        while ((rc = tp_write(r->ep, NULL, src, len, to, off, TP_MORE, 0)) == -EAGAIN) {
                start = start ? start : clock_ns();
                rc = make_room(r, start);
                if (rc < 0)
                        return rc;
        }
        return rc < 0 ? err_trail(rc, "while writing to %s", r->url) : 0;
}

int remote_send(struct remote *r, const void *frame, size_t len)
{
        uint64_t start = 0;
        int rc;

        while ((rc = tp_send(r->ep, frame, len, 0, 0)) == -EAGAIN) {
                start = start ? start : clock_ns();
                rc = make_room(r, start);
                if (rc < 0)
                        return rc;
        }
        return rc < 0 ? err_trail(rc, "while sending to %s", r->url) : 0;
}

/* ---- set-up ---- */

static int gone(const struct remote *r)
{
        return err_set(r->dead, "%s: the server is gone: %s", r->url, r->why);
}

static int exchange(struct remote *r, void *frame, size_t len, enum msg_opcode op, uint32_t flags,
                    enum msg_opcode answer)
{
        uint64_t id = r->next_id++;
        int rc;

        if (r->dead)
                return gone(r);
        msg_header_init(frame, op, len, flags, id);
        rc = remote_send(r, frame, len);
        return rc < 0 ? rc : remote_answer(r, answer, id, NULL);
}

static int hello(struct remote *r, uint8_t nonce_c[NONCE_BYTES], uint8_t nonce_s[NONCE_BYTES])
{
        struct msg_hello m = {.version_min = MSG_VERSION, .version_max = MSG_VERSION, .needs_key = r->opts.key.present};
        const struct msg_hello *a = (const void *)r->inbox;
        int rc;

        nonce_random(nonce_c);
        memcpy(m.nonce, nonce_c, NONCE_BYTES);
        rc = exchange(r, &m, sizeof m, MSG_HELLO, r->opts.insecure ? HELLO_INSECURE : 0, MSG_HELLO);
        if (rc < 0)
                return err_trail(rc, "in phase hello");
        if (a->version_min != MSG_VERSION)
                return err_set(-EPROTO, "%s: speaks version %u of the protocol, this client %u", r->url, a->version_min,
                               MSG_VERSION);
        if (a->needs_key && !r->opts.key.present)
                return err_set(-EACCES, "%s: the server wants a key; give --key-file or DJINN_KEY_FILE", r->url);
        if (!a->needs_key && r->opts.key.present)
                return err_set(-EACCES, "%s: the server has no key and cannot prove itself; start it with the same key",
                               r->url);
        memcpy(nonce_s, a->nonce, NONCE_BYTES);
        return 0;
}

static int authenticate(struct remote *r)
{
        uint8_t nonce_c[NONCE_BYTES], nonce_s[NONCE_BYTES];
        struct msg_auth m = {0};
        uint64_t boot[2];
        int rc = hello(r, nonce_c, nonce_s);

        if (rc < 0)
                return rc;
        if (r->opts.key.present)
                auth_prove(&r->opts.key, AUTH_CLIENT, nonce_c, nonce_s, m.proof);
        rc = exchange(r, &m, sizeof m, MSG_AUTH, 0, MSG_AUTH);
        if (rc < 0)
                return err_trail(rc, "in phase auth%s",
                                 r->opts.key.present ? "; do both sides have the same key?" : "");
        memcpy(&r->server, r->inbox, sizeof r->server);
        if (r->opts.key.present && !auth_check(&r->opts.key, AUTH_SERVER, nonce_c, nonce_s, r->server.proof))
                return err_set(-EACCES, "%s: the server did not prove the key", r->url);
        manifest_boot_id(boot);
        r->same_kernel = boot[0] == r->server.boot_id[0] && boot[1] == r->server.boot_id[1];
        return 0;
}

/* At least so many exchanges; more, up to CLOCK_SAMPLES, while none is half as good as the best ever over this
 * connection: a host that is busy just now need not be so in a moment. */
static int sample_clock(struct remote *r, unsigned least, struct offset *best)
{
        const struct msg_time *a = (const void *)r->inbox;

        *best = OFFSET_UNKNOWN;
        for (unsigned i = 0; i < CLOCK_SAMPLES && (i < least || best->error_ns / 2 > r->clock_best_ns); i++) {
                struct msg_time m = {.client_ns = clock_ns()};
                uint64_t now;
                int rc = exchange(r, &m, sizeof m, MSG_TIME, 0, MSG_TIME);

                now = clock_ns();
                if (rc < 0)
                        return err_trail(rc, "while sampling the clock");
                if (a->received_ns > a->offered_ns || a->offered_ns > STAMP_MAX_NS)
                        return err_set(-EPROTO, "%s: what it says of its clock cannot be", r->url);
                offset_see(best, m.client_ns, a->received_ns, a->offered_ns, now);
        }
        r->offset_ns = best->ns;
        r->clock_error_ns = best->error_ns;
        r->clock_best_ns = best->error_ns < r->clock_best_ns ? best->error_ns : r->clock_best_ns;
        return 0;
}

/* Two processes of one kernel read one clock: nothing to correct. That they say so is not enough (a time namespace has its
 * own zero): then the offset measured must be one that an equal clock can show. */
static int first_clock(struct remote *r)
{
        struct offset o;
        int rc = sample_clock(r, CLOCK_SAMPLES, &o);

        if (rc < 0)
                return rc;
        r->same_clock = r->same_kernel && llabs(o.ns) <= (int64_t)o.error_ns + 1; /* 1: halves are cut off */
        if (r->same_clock)
                r->offset_ns = 0, r->clock_error_ns = 0;
        return 0;
}

int remote_clock(struct remote *r, struct offset *now)
{
        if (!r->same_clock)
                return sample_clock(r, CLOCK_FOLLOW, now);
        *now = (struct offset){.at_ns = clock_ns()};
        return 0;
}

int remote_open(const char *url, const struct remote_opts *opts, struct remote *r)
{
        int rc;

        *r = (struct remote){.opts = *opts, .next_id = 1, .clock_best_ns = UINT64_MAX};
        snprintf(r->url, sizeof r->url, "%s", url);
        rc = tp_open(url, NULL, &r->ctx);
        if (rc == 0)
                rc = tp_connect(r->ctx, url, clock_ns() + opts->timeout_ns, &r->ep);
        if (rc == 0) {
                tp_attr(r->ep, &r->attr);
                r->frame = aligned_alloc(CACHE_LINE, ALIGN_UP(r->attr.msg_max, CACHE_LINE));
                r->inbox = aligned_alloc(CACHE_LINE, ALIGN_UP(r->attr.msg_max, CACHE_LINE));
                rc = r->frame && r->inbox ? authenticate(r) : err_set(-ENOMEM, "out of memory for a connection");
        }
        if (rc == 0)
                rc = first_clock(r);
        if (rc < 0)
                remote_close(r);
        return rc;
}

void remote_close(struct remote *r)
{
        struct msg_header bye;

        if (r->ep && !r->dead) {
                msg_header_init(&bye, MSG_BYE, sizeof bye, 0, 0);
                (void)tp_send(r->ep, &bye, sizeof bye, 0, 0);
        }
        if (r->ep)
                tp_ep_close(r->ep);
        if (r->ctx)
                tp_close(r->ctx);
        free(r->frame);
        free(r->inbox);
        *r = (struct remote){0};
}

static int load_part(struct remote *r, struct msg_load *m, const uint8_t *block, uint32_t off, uint32_t part)
{
        uint32_t total = m->total_len;
        size_t len = sizeof *m + part;
        uint64_t id = r->next_id++;
        int rc;

        m->offset = off;
        m->part_len = part;
        msg_header_init(&m->h, MSG_LOAD, len, 0, id);
        memcpy(r->frame, m, sizeof *m);
        memcpy(r->frame + sizeof *m, block + off, part);
        rc = remote_send(r, r->frame, len);
        if (rc < 0 || off + part < total)
                return rc;
        return remote_answer(r, MSG_LOADED, id, NULL);
}

int remote_load(struct remote *r, const struct graph *g, enum msg_weights weights, const char *model_id, uint64_t seed,
                struct remote_model *out)
{
        struct msg_load m = {.total_len = g->h->total_bytes, .weights = weights, .seed = seed};
        uint64_t start = clock_ns(), patience = r->opts.timeout_ns;
        uint32_t part = (uint32_t)(r->attr.msg_max - sizeof m);
        int rc = 0;

        *out = (struct remote_model){.ntensors = g->h->ntensors};
        if (r->dead)
                return gone(r);
        if (model_id && strlen(model_id) >= sizeof m.model_id)
                return err_set(-ENAMETOOLONG, "model id longer than %zu characters", sizeof m.model_id - 1);
        if (model_id)
                memcpy(m.model_id, model_id, strlen(model_id));
        r->opts.timeout_ns = patience > 600 * NS_PER_S ? patience : 600 * NS_PER_S; /* weights may be many gigabytes */
        r->load_since = r->next_id;
        for (uint32_t off = 0; off < m.total_len && rc == 0; off += part)
                rc = load_part(r, &m, (const uint8_t *)g->h, off, m.total_len - off < part ? m.total_len - off : part);
        r->load_since = 0;
        r->opts.timeout_ns = patience;
        if (rc < 0)
                return err_trail(rc, "while loading %s", g->h->name);
        memcpy(&out->info, r->inbox, sizeof out->info);
        out->id = out->info.model;
        out->load_ns = clock_ns() - start;
        out->tensors = calloc(out->ntensors, sizeof(struct tp_rmem *));
        return out->tensors ? 0 : err_set(-ENOMEM, "out of memory for a model's keys");
}

static int refer(struct remote *r, enum msg_opcode op, uint32_t model, uint32_t what)
{
        struct msg_model_ref m = {.model = model, .what = what};

        return exchange(r, &m, sizeof m, op, 0, op);
}

int remote_unload(struct remote *r, struct remote_model *m)
{
        int rc = 0;

        for (uint32_t t = 0; m->tensors && t < m->ntensors; t++)
                if (m->tensors[t])
                        tp_rmem_free(m->tensors[t]);
        if (m->tensors && !r->dead)
                rc = refer(r, MSG_DROP, m->id, 1);
        free(m->tensors);
        *m = (struct remote_model){0};
        return rc;
}

int remote_drop_state(struct remote *r, const struct remote_model *m)
{
        return refer(r, MSG_DROP, m->id, 0);
}

static int keys(struct remote *r, struct msg_keys *m)
{
        int rc = exchange(r, m, sizeof *m, MSG_KEYS, 0, MSG_KEYS);

        if (rc == 0)
                memcpy(m, r->inbox, sizeof *m);
        return rc;
}

static int import(struct remote *r, const struct msg_keys *m, struct tp_rmem **out)
{
        struct tp_key key;

        memcpy(key.bytes, m->key, TP_KEY_BYTES);
        return tp_import_key(r->ep, &key, clock_ns() + r->opts.timeout_ns, out);
}

int remote_ask_tensor(struct remote *r, struct remote_model *m, uint32_t tensor)
{
        struct msg_keys k = {.kind = KEYS_ASK_TENSOR, .model = m->id, .index = tensor};
        int rc;

        if (m->tensors[tensor])
                return 0;
        rc = keys(r, &k);
        return rc < 0 ? err_trail(rc, "in phase keys") : import(r, &k, &m->tensors[tensor]);
}

/* What every request over this connection relies on is gone, so it is given up. */
static int lost(struct remote *r, int rc)
{
        if (!r->dead) {
                r->dead = rc;
                snprintf(r->why, sizeof r->why, "%s", err_text());
        }
        return rc;
}

static int give(struct remote *r, uint32_t index, struct tp_mem *mem)
{
        struct msg_keys k = {.kind = KEYS_GIVE, .index = index, .len = mem->region.len};
        struct tp_key key;
        int rc = tp_export_key(mem, 0, mem->region.len, &key);

        if (rc < 0)
                return err_trail(rc, "while registering %zu bytes", mem->region.len);
        memcpy(k.key, key.bytes, TP_KEY_BYTES);
        return keys(r, &k);
}

static int take_back(struct remote *r, uint32_t index)
{
        struct msg_keys k = {.kind = KEYS_REVOKE, .index = index};

        return keys(r, &k);
}

/* The server would not have the new one: it is given the old one back. rc, with its sentence. */
static int back_to(struct remote *r, uint32_t index, struct tp_mem **mem, uint64_t *now, int rc)
{
        char why[sizeof r->why];

        snprintf(why, sizeof why, "%s", err_text());
        if (!*mem || give(r, index, *mem) == 0)
                return err_set(rc, "%s", why);
        *now = 0;
        tp_free(*mem);
        *mem = NULL;
        return lost(r, err_set(rc, "%s", why));
}

/* Region `index` becomes at least len bytes. There is a new one before the old one goes. */
static int grow_region(struct remote *r, uint32_t index, uint64_t len, struct tp_mem **mem, uint64_t *now)
{
        struct tp_mem *grown;
        int rc;

        len = len ? ALIGN_UP(len, (uint64_t)4096) : 4096;
        if (len <= *now)
                return 0;
        if (r->dead)
                return gone(r);
        rc = tp_alloc(r->ep, len, &grown);
        if (rc < 0)
                return err_trail(rc, "while registering %llu bytes", (unsigned long long)len);
        rc = *mem ? take_back(r, index) : 0;
        if (rc < 0) {
                tp_free(grown);
                return lost(r, rc); /* whether the server still has the old one is not known */
        }
        rc = give(r, index, grown);
        if (rc < 0) {
                tp_free(grown);
                return back_to(r, index, mem, now, rc);
        }
        if (*mem)
                tp_free(*mem);
        *mem = grown;
        *now = len;
        return 0;
}

int remote_region(struct remote *r, uint64_t len)
{
        return grow_region(r, 0, len, &r->region, &r->region_len);
}

/* A buffer of the server's becomes at least m->len bytes. While the server refuses, the old one is still there; once it
 * has answered, the old one is not. */
static int grow_buffer(struct remote *r, struct msg_keys *m, struct tp_rmem **rmem, uint64_t *now)
{
        uint64_t len = m->len;
        bool had = *rmem != NULL;
        int rc;

        if (len <= *now)
                return 0;
        rc = keys(r, m);
        if (rc < 0)
                return err_trail(rc, "in phase keys");
        *now = 0;
        if (*rmem)
                tp_rmem_free(*rmem);
        *rmem = NULL;
        rc = import(r, m, rmem);
        if (rc == 0 && (*rmem)->len < len) {
                rc = err_set(-EPROTO, "%s: asked for %llu bytes, was given %llu", r->url, (unsigned long long)len,
                             (unsigned long long)(*rmem)->len);
                tp_rmem_free(*rmem);
                *rmem = NULL;
        }
        if (rc < 0)
                return had ? lost(r, rc) : rc;
        *now = len;
        return 0;
}

int remote_staging(struct remote *r, uint64_t len)
{
        struct msg_keys k = {.kind = KEYS_ASK_STAGING, .len = len};

        return grow_buffer(r, &k, &r->staging, &r->staging_len);
}

int remote_shadow(struct remote *r, uint64_t up_len, uint64_t down_len)
{
        uint64_t need = up_len > down_len ? up_len : down_len; /* the server's is target and source */
        struct msg_keys k = {.kind = KEYS_ASK_SHADOW, .len = need ? need : 1};
        int rc = grow_buffer(r, &k, &r->shadow, &r->shadow_len);

        return rc < 0 ? rc : grow_region(r, 1, down_len, &r->shadow_region, &r->shadow_region_len);
}

int remote_stats(struct remote *r, struct msg_stats *out)
{
        struct msg_stats m = {0};
        int rc = exchange(r, &m, sizeof m, MSG_STATS, 0, MSG_STATS);

        if (rc == 0)
                memcpy(out, r->inbox, sizeof *out);
        return rc;
}
