/*
 * rdma by the kernel's connection manager (?cm=1): no TCP socket; addresses are resolved, queue pairs found and the
 * peer's death is told by rdma_cm, also where the fabric's administrator lets nothing else through.
 *
 * The queue pairs are made on the context's own device handle, as with the bootstrap, and rdma_cm is asked for their
 * attributes only. Its private data carries what the bootstrap's greeting says otherwise. It has no words for an orderly
 * end, so a last message (RDMA_BYE) says it.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <rdma/rdma_cma.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "inet.h"
#include "log.h"
#include "rdma_private.h"

#define CM_MAGIC    0x6a646d63u
#define CM_VERSION  1
#define CM_BACKLOG  128
#define CM_HALF_MAX 64u
#define CM_STEP_MS  2000 /* the kernel's own limit for one step of resolving */

/* What a listener that is not there answers: "invalid service id" of InfiniBand's table of reasons. */
#define CM_REJECT_NOBODY   8
#define CM_REJECT_CONSUMER 28

struct cm_hello { /* in the private data, little endian */
        uint32_t magic;
        uint16_t version, window;
        uint32_t msg_max, zero;
        uint64_t session;
};

_Static_assert(sizeof(struct cm_hello) == 24, "wire layout");
_Static_assert(sizeof(struct cm_hello) <= 56, "what a connection request has room for");

struct rdma_cm {
        struct rdma_event_channel *channel;
};

/* ---- channels ---- */

static int channel_make(struct rdma_event_channel **out)
{
        *out = rdma_create_event_channel();
        if (!*out)
                return -errno;
        if (fcntl((*out)->fd, F_SETFL, fcntl((*out)->fd, F_GETFL) | O_NONBLOCK) == 0 &&
            fcntl((*out)->fd, F_SETFD, FD_CLOEXEC) == 0)
                return 0;
        rdma_destroy_event_channel(*out);
        return -EIO;
}

static int cm_need(struct rdma_ctx *c)
{
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &c->cm_tag};
        int rc;

        if (c->cm)
                return 0;
        c->cm = calloc(1, sizeof(*c->cm));
        rc = c->cm ? channel_make(&c->cm->channel) : -ENOMEM;
        if (rc == 0 && epoll_ctl(c->epfd, EPOLL_CTL_ADD, c->cm->channel->fd, &e) < 0) {
                rc = -errno;
                rdma_destroy_event_channel(c->cm->channel);
        }
        if (rc == 0)
                return 0;
        free(c->cm);
        c->cm = NULL;
        return err_set(rc, "rdma: cannot use the kernel's connection manager: %s; is the module rdma_ucm loaded?",
                       strerror(-rc));
}

void rdma_cm_close(struct rdma_ctx *c)
{
        if (!c->cm)
                return;
        rdma_destroy_event_channel(c->cm->channel);
        free(c->cm);
        c->cm = NULL;
}

/* ---- queue pairs ---- */

static void hello_fill(const struct rdma_ep *ep, struct cm_hello *h)
{
        *h = (struct cm_hello){
            .magic = htole32(CM_MAGIC),
            .version = htole16(CM_VERSION),
            .window = htole16((uint16_t)ep->window),
            .msg_max = htole32(ep->rx_slot),
            .session = htole64(ep->session),
        };
}

static int hello_check(const struct cm_hello *h, size_t have, const char *peer)
{
        uint32_t window = le16toh(h->window), msg_max = le32toh(h->msg_max);

        if (have < sizeof(*h) || le32toh(h->magic) != CM_MAGIC)
                return err_set(-EPROTO, "%s: what is there does not speak djinnbench's rdma transport", peer);
        if (le16toh(h->version) != CM_VERSION)
                return err_set(-EPROTO, "%s: the peer speaks version %u of the rdma greeting, this program version %u",
                               peer, le16toh(h->version), CM_VERSION);
        if (window < RDMA_WINDOW_MIN || window > RDMA_WINDOW_LIMIT || msg_max < TP_MSG_MAX_LEAST ||
            msg_max > RDMA_MSG_LIMIT)
                return err_set(-EPROTO, "%s: the greeting holds values that no version sends", peer);
        return 0;
}

/* The connection must lead over the device on which the context's queues are. */
static int same_device(const struct rdma_ctx *c, const struct rdma_cm_id *id, const char *peer)
{
        const char *name = id->verbs ? ibv_get_device_name(id->verbs->device) : "no device";

        if (id->verbs && !strcmp(name, ibv_get_device_name(c->port.verbs->device)) && id->port_num == c->port.number)
                return 0;
        return err_set(-EXDEV, "%s: the connection manager leads over %s/%u, this context uses %s; say dev=%s/%u", peer,
                       name, id->port_num, c->port.name, name, id->port_num);
}

static int qp_step(struct rdma_ep *ep, enum ibv_qp_state state, const struct rdma_url *par)
{
        struct ibv_qp_attr a = {.qp_state = state};
        int mask = 0;

        if (rdma_init_qp_attr(ep->cm, &a, &mask) != 0)
                return -errno;
        if (mask & IBV_QP_MIN_RNR_TIMER)
                a.min_rnr_timer = 12; /* the manager's 0 means 655 ms */
        if (mask & IBV_QP_TIMEOUT)
                a.timeout = (uint8_t)par->timeout;
        if (mask & IBV_QP_AV) {
                a.ah_attr.grh.traffic_class = par->tc ? (uint8_t)par->tc : a.ah_attr.grh.traffic_class;
                ep->mtu = a.path_mtu;
                ep->gid.index = a.ah_attr.is_global ? a.ah_attr.grh.sgid_index : -1;
        }
        return -ibv_modify_qp(ep->sq[0].qp, &a, mask);
}

static int ep_complete(struct rdma_ctx *c, struct rdma_ep *ep, const struct cm_hello *h, const struct rdma_url *par)
{
        int rc = qp_step(ep, IBV_QPS_RTR, par);

        rc = rc ? rc : rdma_receive_all(ep);
        rc = rc ? rc : qp_step(ep, IBV_QPS_RTS, par);
        if (rc < 0)
                return err_set(rc, "%s: cannot connect queue pair %u: %s", ep->base.peer, ep->sq[0].qpn, strerror(-rc));
        ep->credits = ep->peer_window = le16toh(h->window);
        ep->peer_msg_max = le32toh(h->msg_max);
        ep->secret ^= le64toh(h->session);
        ep->reg_port = (struct rdma_reg_port){.port = c->port.number, .gid_index = ep->gid.index};
        return rdma_gid_choose(&c->port, ep->gid.index, -1, NULL, ep->base.peer, &ep->gid);
}

static uint8_t at_most_255(int n)
{
        return (uint8_t)(n < 255 ? n : 255);
}

static struct rdma_conn_param conn_param(const struct rdma_ctx *c, const struct rdma_ep *ep, const struct cm_hello *h)
{
        return (struct rdma_conn_param){
            .private_data = h,
            .private_data_len = sizeof(*h),
            .responder_resources = at_most_255(c->port.dev.max_qp_rd_atom),
            .initiator_depth = at_most_255(c->port.dev.max_qp_init_rd_atom),
            .retry_count = 7,
            .rnr_retry_count = 7,
            .qp_num = ep->sq[0].qpn,
        };
}

/* ---- ends ---- */

void rdma_cm_hang_up(struct rdma_ep *ep)
{
        if (ep->cm_connected)
                rdma_disconnect(ep->cm);
        ep->cm_connected = false;
}

void rdma_cm_free(struct rdma_ep *ep)
{
        if (ep->cm)
                rdma_destroy_id(ep->cm);
        ep->cm = NULL;
}

/* ---- listening ---- */

int rdma_cm_listen(struct rdma_ctx *c, const char *url, const struct tp_url *u, struct rdma_listener *l)
{
        struct addrinfo *ai;
        int rc = cm_need(c);

        rc = rc ? rc : inet_resolve(url, u, true, &ai);
        if (rc < 0)
                return rc;
        if (rdma_create_id(c->cm->channel, &l->cm, l, RDMA_PS_TCP) != 0 || rdma_bind_addr(l->cm, ai->ai_addr) != 0 ||
            rdma_listen(l->cm, CM_BACKLOG) != 0)
                rc = err_set(-errno, "%s: cannot listen by rdma_cm: %s%s", url, strerror(errno),
                             errno == ENODEV ? " (the address must be one of an RDMA device's network interface)" : "");
        freeaddrinfo(ai);
        if (rc < 0) {
                rdma_cm_listener_free(l);
                return rc;
        }
        inet_url(rdma_get_local_addr(l->cm), "rdma", l->base.url);
        strcat(l->base.url, "?cm=1");
        return 0;
}

void rdma_cm_listener_free(struct rdma_listener *l)
{
        if (l->cm)
                rdma_destroy_id(l->cm);
        l->cm = NULL;
}

static int request_answer(struct rdma_listener *l, struct rdma_cm_id *id, const struct cm_hello *h, size_t have)
{
        struct rdma_ctx *c = rdma_ctx_of(l->base.ctx);
        struct rdma_conn_param param;
        struct cm_hello mine;
        struct rdma_ep *ep;
        char peer[TP_URL_MAX];
        int rc;

        inet_url(rdma_get_peer_addr(id), "rdma", peer);
        rc = hello_check(h, have, peer);
        rc = rc ? rc : same_device(c, id, peer);
        if (rc == 0 && l->n_half + l->n_ready >= CM_HALF_MAX)
                rc = err_set(-EBUSY, "%s: %u connections are being made", peer, l->n_half);
        rc = rc ? rc : rdma_ep_make(c, 1, 1, &l->url, peer, &ep);
        if (rc < 0)
                return rc;
        ep->cm = id;
        ep->half_of = l;
        id->context = ep;
        hello_fill(ep, &mine);
        rc = ep_complete(c, ep, h, &l->url);
        param = conn_param(c, ep, &mine);
        if (rc == 0 && rdma_accept(id, &param) != 0)
                rc = err_set(-errno, "%s: cannot accept: %s", peer, strerror(errno));
        if (rc < 0) {
                ep->cm = NULL; /* the caller's, who rejects */
                rdma_ep_free(ep);
                return rc;
        }
        ep->cm_connected = true;
        l->n_half++;
        return 0;
}

static void on_request(struct rdma_listener *l, struct rdma_cm_id *id, const struct cm_hello *h, size_t have)
{
        const char *why;

        if (request_answer(l, id, h, have) == 0)
                return;
        why = err_text();
        log_debug("%s: refused a connection: %s", l->base.url, why);
        rdma_reject(id, why, (uint8_t)strnlen(why, 140));
        rdma_destroy_id(id);
}

static void half_end(struct rdma_ep *ep)
{
        ep->half_of->n_half--;
        ep->half_of = NULL;
}

/* Half-made connections of a listener that closes. They are found by their context's slots. */
void rdma_cm_drop_halves(struct rdma_ctx *c, struct rdma_listener *l)
{
        for (uint32_t i = 0; i < c->n_slots; i++)
                if (c->slots[i] && c->slots[i]->half_of == l)
                        rdma_ep_free(c->slots[i]);
}

/* ---- events of the context's channel ---- */

void rdma_cm_joined(struct rdma_ep *ep)
{
        if (!ep->cm_gone)
                return;
        rdma_cm_hang_up(ep); /* answers the peer's */
        rdma_fail(ep, 0, "%s: closed the connection", ep->base.peer);
}

static void on_end(struct rdma_ep *ep, enum rdma_cm_event_type type)
{
        if (ep->half_of) {
                half_end(ep);
                rdma_ep_free(ep);
                return;
        }
        if (type == RDMA_CM_EVENT_DISCONNECTED) {
                ep->cm_gone = ep->state <= RDMA_EP_LIVE; /* whether orderly, what is still to be received will say */
                if (ep->state == RDMA_EP_LIVE)           /* before tp_accept it waits for that: rdma_cm_joined */
                        rdma_cm_joined(ep);
        } else {
                rdma_fail(ep, -ECONNRESET, "%s: the connection manager says %s", ep->base.peer, rdma_event_str(type));
        }
}

static void on_event(struct rdma_ctx *c, struct rdma_cm_event *e)
{
        enum rdma_cm_event_type type = e->event;
        struct rdma_cm_id *id = e->id;
        struct cm_hello h = {0};
        size_t have = e->param.conn.private_data_len;

        if (type == RDMA_CM_EVENT_CONNECT_REQUEST && have >= sizeof(h))
                memcpy(&h, e->param.conn.private_data, sizeof(h));
        rdma_ack_cm_event(e); /* before an id may be destroyed */
        switch (type) {
        case RDMA_CM_EVENT_CONNECT_REQUEST:
                on_request(id->context, id, &h, have);
                break;
        case RDMA_CM_EVENT_ESTABLISHED: {
                struct rdma_ep *ep = id->context;
                struct rdma_listener *l = ep->half_of;

                if (!l)
                        break;
                half_end(ep);
                rdma_listener_ready(l, ep);
                break;
        }
        case RDMA_CM_EVENT_CONNECT_ERROR:
        case RDMA_CM_EVENT_UNREACHABLE:
        case RDMA_CM_EVENT_REJECTED:
        case RDMA_CM_EVENT_DISCONNECTED:
        case RDMA_CM_EVENT_DEVICE_REMOVAL:
                /* A device that goes away tells listeners, too. */
                if (id->context && *(enum rdma_tag *)id->context == RDMA_TAG_EP)
                        on_end(id->context, type);
                break;
        default:
                break;
        }
}

void rdma_cm_progress(struct rdma_ctx *c)
{
        struct rdma_cm_event *e;

        while (rdma_get_cm_event(c->cm->channel, &e) == 0)
                on_event(c, e);
}

/* ---- connecting ---- */

static int refusal(const char *url, const struct rdma_cm_event *e)
{
        const char *why = e->param.conn.private_data;
        char text[160] = "";

        if (e->event != RDMA_CM_EVENT_REJECTED)
                return err_set(e->status == -ETIMEDOUT ? -ETIMEDOUT : -EHOSTUNREACH, "%s: cannot connect: %s (%d)", url,
                               rdma_event_str(e->event), e->status);
        if (e->status == CM_REJECT_NOBODY)
                return err_set(-ECONNREFUSED, "%s: nothing listens there by rdma_cm", url);
        for (unsigned i = 0; e->status == CM_REJECT_CONSUMER && why && i < e->param.conn.private_data_len && i < 140;
             i++)
                text[i] = why[i] >= ' ' && why[i] < 127 ? why[i] : '\0';
        return err_set(-ECONNREFUSED, "%s: the peer refused the connection (reason %d) %s", url, e->status, text);
}

/* Waits for this event on the connector's own channel; h (may be NULL): the private data that comes with it. */
static int await(struct rdma_event_channel *ch, const char *url, enum rdma_cm_event_type want, uint64_t deadline_ns,
                 const struct inet_idle *idle, struct cm_hello *h)
{
        struct rdma_cm_event *e;
        int rc = 0;

        while (rdma_get_cm_event(ch, &e) != 0) {
                if (errno != EAGAIN)
                        return err_set(-errno, "%s: rdma_cm: %s", url, strerror(errno));
                rc = inet_wait(ch->fd, POLLIN, deadline_ns, idle);
                if (rc < 0)
                        return err_set(rc, "%s: no answer while waiting for %s: %s", url, rdma_event_str(want),
                                       strerror(-rc));
        }
        if (e->event != want)
                rc = refusal(url, e);
        else if (h && e->param.conn.private_data_len >= sizeof(*h))
                memcpy(h, e->param.conn.private_data, sizeof(*h));
        rdma_ack_cm_event(e);
        return rc;
}

static int cm_error(const char *url, const char *step)
{
        return err_set(-errno, "%s: %s: %s", url, step, strerror(errno));
}

static int find_way(struct rdma_event_channel *ch, struct rdma_cm_id *id, const char *url, struct sockaddr *to,
                    uint64_t deadline_ns, const struct inet_idle *idle)
{
        int rc;

        if (rdma_resolve_addr(id, NULL, to, CM_STEP_MS) != 0)
                return cm_error(url, "cannot resolve the address over RDMA");
        rc = await(ch, url, RDMA_CM_EVENT_ADDR_RESOLVED, deadline_ns, idle, NULL);
        if (rc < 0)
                return rc;
        if (rdma_resolve_route(id, CM_STEP_MS) != 0)
                return cm_error(url, "cannot resolve a route over RDMA");
        return await(ch, url, RDMA_CM_EVENT_ROUTE_RESOLVED, deadline_ns, idle, NULL);
}

static int introduce(struct rdma_ctx *c, struct rdma_event_channel *ch, struct rdma_ep *ep, const char *url,
                     const struct rdma_url *par, uint64_t deadline_ns, const struct inet_idle *idle)
{
        struct cm_hello h, theirs = {0};
        struct rdma_conn_param param;
        int rc;

        hello_fill(ep, &h);
        param = conn_param(c, ep, &h);
        if (rdma_connect(ep->cm, &param) != 0)
                return cm_error(url, "cannot connect over RDMA");
        rc = await(ch, url, RDMA_CM_EVENT_CONNECT_RESPONSE, deadline_ns, idle, &theirs);
        rc = rc ? rc : hello_check(&theirs, sizeof(theirs), url);
        rc = rc ? rc : ep_complete(c, ep, &theirs, par);
        if (rc == 0 && rdma_establish(ep->cm) != 0)
                rc = cm_error(url, "cannot establish the connection");
        ep->cm_connected = rc == 0;
        return rc;
}

int rdma_cm_connect(struct rdma_ctx *c, const char *url, const struct tp_url *u, const struct rdma_url *par,
                    uint64_t deadline_ns, const struct inet_idle *idle, struct rdma_ep **out)
{
        struct rdma_event_channel *ch;
        struct rdma_cm_id *id = NULL;
        struct rdma_ep *ep = NULL;
        struct addrinfo *ai;
        char peer[TP_URL_MAX];
        int rc = cm_need(c);

        rc = rc ? rc : inet_resolve(url, u, false, &ai);
        if (rc < 0)
                return rc;
        inet_url(ai->ai_addr, "rdma", peer);
        rc = channel_make(&ch);
        if (rc < 0) {
                freeaddrinfo(ai);
                return err_set(rc, "%s: cannot use rdma_cm: %s", url, strerror(-rc));
        }
        if (rdma_create_id(ch, &id, NULL, RDMA_PS_TCP) != 0)
                rc = cm_error(url, "cannot use rdma_cm");
        rc = rc ? rc : find_way(ch, id, url, ai->ai_addr, deadline_ns, idle);
        freeaddrinfo(ai);
        rc = rc ? rc : same_device(c, id, url);
        rc = rc ? rc : rdma_ep_make(c, 0, 1, par, peer, &ep);
        if (rc == 0) {
                ep->cm = id;
                id->context = ep;
                rc = introduce(c, ch, ep, url, par, deadline_ns, idle);
        }
        if (rc == 0 && rdma_migrate_id(id, c->cm->channel) != 0)
                rc = cm_error(url, "cannot keep the connection");
        if (rc < 0 && ep)
                rdma_ep_free(ep);
        else if (rc < 0 && id)
                rdma_destroy_id(id);
        rdma_destroy_event_channel(ch);
        *out = ep;
        return rc;
}
