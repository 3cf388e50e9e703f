/*
 * rdma, set-up: contexts, queue pairs, the greeting over the bootstrap's socket, memory and keys, and what is told at
 * descriptors. The hot path is rdma_data.c.
 *
 * Each endpoint has a protection domain of its own, so that a key opens nothing on another connection. A key is a
 * registration of exactly the bytes that it opens: the device itself refuses what lies outside, and a registration that
 * has ended.
 */
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "inside.h"
#include "log.h"
#include "rdma_private.h"

#define PROTOCOL      BOOT_PROTOCOL('r', 'd', 'm', 'a')
#define KEY_MAGIC     0x79656b616d6472ull
#define READY_MAX     64u
#define CLOSE_WAIT_NS (1 * NS_PER_S)
#define BYE_WAIT_NS   (1 * NS_PER_S)
#define FRAMES_MOST   8u /* taken from one bootstrap socket in one go */
#define CQ_FIRST      2048u
#define WC_FIRST      1024u
#define RING_WIDE     (256u << 10)
#define RING_NARROW   (32u << 10)

struct rdma_hello { /* on the wire, little endian */
        uint8_t gid[16];
        uint32_t link, lid;
        uint32_t psn, mtu; /* mtu: enum ibv_mtu */
        uint32_t window, msg_max;
        uint32_t reads, n_qps; /* reads: that our device serves at once, per queue pair */
        uint64_t session;
        uint32_t reads_out, zero; /* reads that it can have outstanding */
        uint32_t qpn[RDMA_QPS_MAX];
};

_Static_assert(sizeof(struct rdma_hello) == 128, "wire layout");
_Static_assert(offsetof(struct rdma_hello, session) == 48, "wire layout");
_Static_assert(sizeof(struct rdma_hello) <= BOOT_PAYLOAD_MAX, "wire layout");

/* ---- context ---- */

static int epoll_join(int epfd, int fd, enum rdma_tag *who)
{
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = who};

        return epoll_ctl(epfd, EPOLL_CTL_ADD, fd, &e) < 0 ? -errno : 0;
}

static int nonblocking(int fd)
{
        int flags = fcntl(fd, F_GETFL);

        return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

static void ctx_free(struct rdma_ctx *c)
{
        for (unsigned i = 0; i < c->n_cq; i++)
                ibv_destroy_cq(c->cq[i].cq);
        if (c->channel)
                ibv_destroy_comp_channel(c->channel);
        if (c->port.verbs)
                ibv_close_device(c->port.verbs);
        if (c->epfd >= 0)
                close(c->epfd);
        free(c->cq);
        free(c->wc);
        free(c->slots);
        free(c);
}

static int ctx_watch(struct rdma_ctx *c)
{
        int rc;

        c->epfd = epoll_create1(EPOLL_CLOEXEC);
        if (c->epfd < 0)
                return -errno;
        c->channel = ibv_create_comp_channel(c->port.verbs);
        if (!c->channel)
                return -errno;
        rc = nonblocking(c->channel->fd);
        rc = rc ? rc : nonblocking(c->port.verbs->async_fd);
        rc = rc ? rc : epoll_join(c->epfd, c->channel->fd, &c->channel_tag);
        return rc ? rc : epoll_join(c->epfd, c->port.verbs->async_fd, &c->async_tag);
}

static int rdma_open(const char *url, const struct tp_open_opts *opts, struct tp_ctx **out)
{
        struct rdma_ctx *c = calloc(1, sizeof(*c));
        struct tp_url u = {.scheme = "rdma"};
        int rc = 0;

        if (!c)
                return err_set(-ENOMEM, "rdma: no memory for a context");
        c->epfd = -1;
        c->base.ops = &tp_rdma_ops;
        c->todo_end = &c->todo;
        c->channel_tag = RDMA_TAG_CHANNEL;
        c->async_tag = RDMA_TAG_ASYNC;
        c->cm_tag = RDMA_TAG_CM;
        c->gpu_path = opts->gpu_path;
        c->cq = calloc(RDMA_CQS_MAX, sizeof(*c->cq));
        c->wc = calloc(WC_FIRST, sizeof(*c->wc));
        c->wc_cap = WC_FIRST;
        rdma_url_default(&c->url);
        if (strstr(url, "://"))
                rc = tpi_url_expect(url, "rdma", &u);
        if (!rc && (!c->cq || !c->wc))
                rc = err_set(-ENOMEM, "rdma: no memory for a context");
        rc = rc ? rc : rdma_url_read(url, &u, &c->url);
        setenv("MLX5_SCATTER_TO_CQE", "0", 0); /* its provider would let the processor write into device memory */
        /* Where the kernel copies pinned pages at fork this does nothing; elsewhere it keeps them out of the child. */
        ibv_fork_init();
        rc = rc ? rc : rdma_port_open(url, &u, &c->url, &c->port);
        if (!rc && (rc = ctx_watch(c)) < 0)
                rc = err_set(rc, "%s: %s: cannot make a poll set: %s", url, c->port.name, strerror(-rc));
        if (rc < 0) {
                ctx_free(c);
                return rc;
        }
        *out = &c->base;
        return 0;
}

static void rdma_close(struct tp_ctx *base)
{
        struct rdma_ctx *c = rdma_ctx_of(base);

        while (c->listeners)
                tp_listener_close(&c->listeners->base);
        while (c->eps)
                tp_ep_close(&c->eps->base);
        rdma_cm_close(c);
        ctx_free(c);
}

/* ---- completion queues ---- */

static int cq_new(struct rdma_ctx *c, uint32_t need)
{
        uint32_t size = need > CQ_FIRST ? need : CQ_FIRST;
        struct ibv_cq *cq;

        if (c->n_cq == RDMA_CQS_MAX)
                return -ENOSPC;
        if (c->n_cq > 0 || size > (uint32_t)c->port.dev.max_cqe)
                size = (uint32_t)c->port.dev.max_cqe;
        cq = ibv_create_cq(c->port.verbs, (int)size, NULL, c->channel, 0);
        if (!cq)
                return -errno;
        c->cq[c->n_cq++] = (struct rdma_cq){.cq = cq};
        return 0;
}

/* Room for `need` completions at once, so that a queue never overflows even when everything on it is flushed. */
static int cq_promise(struct rdma_ctx *c, uint32_t need, struct rdma_cq **out)
{
        for (unsigned tries = 0; tries < 2; tries++) {
                for (unsigned i = 0; i < c->n_cq; i++) {
                        struct rdma_cq *q = &c->cq[i];
                        uint32_t want = q->promised + need, size = 2 * want;

                        if (size > (uint32_t)c->port.dev.max_cqe)
                                size = (uint32_t)c->port.dev.max_cqe;
                        if (want > (uint32_t)q->cq->cqe && (want > size || ibv_resize_cq(q->cq, (int)size) != 0))
                                continue;
                        q->promised = want;
                        *out = q;
                        return 0;
                }
                if (tries == 0) {
                        int rc = cq_new(c, need);

                        if (rc < 0)
                                return rc;
                }
        }
        return -ENOSPC;
}

/* ---- endpoints: making ---- */

static int slot_take(struct rdma_ctx *c, struct rdma_ep *ep)
{
        uint32_t i = 0;

        while (i < c->n_slots && c->slots[i])
                i++;
        if (i == c->n_slots) {
                uint32_t n = c->n_slots ? 2 * c->n_slots : 16;
                struct rdma_ep **more = n <= RDMA_SLOTS_MAX ? realloc(c->slots, n * sizeof(*more)) : NULL;

                if (!more)
                        return -ENOMEM;
                memset(more + c->n_slots, 0, (n - c->n_slots) * sizeof(*more));
                c->slots = more;
                c->n_slots = n;
        }
        ep->slot = i;
        ep->generation = c->generation++;
        c->slots[i] = ep;
        return 0;
}

void rdma_ep_free(struct rdma_ep *ep)
{
        struct rdma_ctx *c = rdma_ctx_of(ep->base.ctx);

        rdma_forget(ep);
        if (ep->fd >= 0)
                close(ep->fd);
        rdma_cm_free(ep);
        for (unsigned i = 0; ep->sq && i < ep->n_qps; i++) {
                if (ep->sq[i].qp)
                        ibv_destroy_qp(ep->sq[i].qp);
                free(ep->sq[i].rec);
        }
        if (ep->pool_mr)
                ibv_dereg_mr(ep->pool_mr);
        if (ep->pd)
                ibv_dealloc_pd(ep->pd);
        if (ep->pool)
                munmap(ep->pool, ep->pool_bytes);
        if (ep->cq)
                ep->cq->promised -= ep->cqes;
        if (c->slots && c->slots[ep->slot] == ep)
                c->slots[ep->slot] = NULL;
        free(ep->sq);
        free(ep->rx_wr);
        free(ep->rx_sge);
        free(ep->early);
        free(ep->ops);
        free(ep);
}

static uint32_t power_of_two(uint32_t least)
{
        uint32_t n = 1;

        while (n < least)
                n *= 2;
        return n;
}

static void ep_sizes(struct rdma_ep *ep, const struct rdma_ctx *c, const struct rdma_url *par)
{
        bool wide = c->n_eps < RDMA_WIDE_EPS;
        uint32_t ring = wide ? RING_WIDE : RING_NARROW;

        ep->window = par->window ? (uint32_t)par->window : wide ? RDMA_WINDOW_WIDE : RDMA_WINDOW_NARROW;
        ep->owed_tell = ep->window / 4;
        ep->chain_most = ep->window / 8;
        ep->rx_depth = ep->window + ep->window / ep->owed_tell + 1;
        ep->rx_slot = par->msg ? (uint32_t)par->msg : RDMA_MSG_MAX;
        ep->rx_slot = ALIGN_UP(ep->rx_slot, (uint32_t)CACHE_LINE);
        ep->ring_size = power_of_two(4 * ep->rx_slot > ring ? 4 * ep->rx_slot : ring);
        ep->pool_bytes = ALIGN_UP((size_t)ep->rx_depth * ep->rx_slot, (size_t)4096) + ep->ring_size;
}

static int ep_pool(struct rdma_ep *ep)
{
        void *pool = mmap(NULL, ep->pool_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (pool == MAP_FAILED)
                return -errno;
        ep->pool = pool;
        ep->rx = ep->pool;
        ep->ring = ep->pool + ep->pool_bytes - ep->ring_size;
        ep->pool_mr = ibv_reg_mr(ep->pd, ep->pool, ep->pool_bytes, IBV_ACCESS_LOCAL_WRITE);
        if (!ep->pool_mr)
                return -errno;
        ep->rx_lkey = ep->tx_lkey = ep->pool_mr->lkey;
        return 0;
}

/* ibv_wr_* where the provider has it (errno says it has not), else the older call. */
static struct ibv_qp *qp_create(struct rdma_ctx *c, struct rdma_ep *ep, struct ibv_qp_init_attr_ex *a, bool *ex)
{
        static const uint32_t inlines[] = {RDMA_INLINE_ASKED, 64, 0};
        struct ibv_qp *qp = NULL;

        for (int plain = 0; plain < 2 && !qp; plain++) {
                for (unsigned i = 0; i < ARRAY_LEN(inlines) && !qp; i++) {
                        a->cap.max_inline_data = inlines[i];
                        a->comp_mask = IBV_QP_INIT_ATTR_PD | (plain ? 0 : IBV_QP_INIT_ATTR_SEND_OPS_FLAGS);
                        qp = ibv_create_qp_ex(c->port.verbs, a);
                }
                *ex = qp && !plain;
        }
        return qp;
}

static int sq_make(struct rdma_ctx *c, struct rdma_ep *ep, unsigned i, const struct rdma_url *par)
{
        struct rdma_sq *s = &ep->sq[i];
        struct ibv_qp_init_attr_ex a = {
            .qp_context = ep,
            .send_cq = ep->cq->cq,
            .recv_cq = ep->cq->cq,
            .cap = {.max_send_wr = s->depth, .max_recv_wr = i ? 1 : ep->rx_depth, .max_send_sge = 1, .max_recv_sge = 1},
            .qp_type = IBV_QPT_RC,
            .pd = ep->pd,
            .send_ops_flags = IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_WRITE |
                              IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ,
        };
        struct ibv_qp_attr attr = {
            .qp_state = IBV_QPS_INIT,
            .port_num = c->port.number,
            .qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ,
        };
        bool ex;

        s->rec = calloc(s->depth, sizeof(*s->rec));
        if (!s->rec)
                return -ENOMEM;
        s->qp = qp_create(c, ep, &a, &ex);
        if (!s->qp)
                return errno ? -errno : -EIO;
        s->ex = ex ? ibv_qp_to_qp_ex(s->qp) : NULL;
        s->index = (uint8_t)i;
        s->qpn = s->qp->qp_num;
        if (i == 0)
                ep->inline_max = a.cap.max_inline_data;
        return -ibv_modify_qp(s->qp, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
}

/* What rdma_reg.c registers with. The probe of device memory needs the GID, which is set once the peer is known. */
static void ep_reg_devs(const struct rdma_ctx *c, struct rdma_ep *ep)
{
        ep->reg_local = (struct rdma_reg_dev){
            .p = &rdma_reg_verbs,
            .pd = ep->pd,
            .force = c->gpu_path,
            .access = IBV_ACCESS_LOCAL_WRITE,
            .max_mr_bytes = c->port.dev.max_mr_size,
            .user = &ep->reg_port,
        };
        snprintf(ep->reg_local.name, sizeof(ep->reg_local.name), "%s", c->port.name);
        ep->reg_remote = ep->reg_local;
        ep->reg_remote.access |= IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
}

static int ep_parts(struct rdma_ctx *c, struct rdma_ep *ep, const struct rdma_url *par, const char **step)
{
        uint32_t depth = c->n_eps < RDMA_WIDE_EPS ? RDMA_SQ_WIDE : RDMA_SQ_NARROW;
        int rc;

        *step = "memory";
        ep_sizes(ep, c, par);
        ep->sq = calloc(ep->n_qps, sizeof(*ep->sq));
        ep->rx_wr = calloc(ep->rx_depth, sizeof(*ep->rx_wr));
        ep->rx_sge = calloc(ep->rx_depth, sizeof(*ep->rx_sge));
        ep->early = calloc(ep->side ? ep->rx_depth : 1, sizeof(*ep->early));
        ep->ops = ep->n_qps > 1 ? calloc(RDMA_OPS, sizeof(*ep->ops)) : NULL;
        rc = ep->sq && ep->rx_wr && ep->rx_sge && ep->early && (ep->n_qps == 1 || ep->ops) ? slot_take(c, ep) : -ENOMEM;
        if (rc < 0)
                return rc;
        *step = "a protection domain";
        ep->pd = ibv_alloc_pd(c->port.verbs);
        if (!ep->pd)
                return -errno;
        *step = "registering its buffers (memlock limit? see ulimit -l)";
        rc = ep_pool(ep);
        if (rc < 0)
                return rc;
        ep_reg_devs(c, ep);
        *step = "room in a completion queue";
        ep->cqes = ep->n_qps * depth + ep->rx_depth;
        rc = cq_promise(c, ep->cqes, &ep->cq);
        *step = "a queue pair";
        for (unsigned i = 0; rc == 0 && i < ep->n_qps; i++) {
                ep->sq[i].depth = depth;
                rc = sq_make(c, ep, i, par);
        }
        return rc;
}

int rdma_ep_make(struct rdma_ctx *c, unsigned side, unsigned n_qps, const struct rdma_url *par, const char *peer,
                 struct rdma_ep **out)
{
        struct rdma_ep *ep = calloc(1, sizeof(*ep));
        const char *step;
        uint64_t max_msg = c->port.port.max_msg_sz;
        int rc;

        if (!ep)
                return err_set(-ENOMEM, "%s: no memory for a connection", peer);
        ep->tag = RDMA_TAG_EP;
        ep->fd = -1;
        ep->side = side;
        ep->n_qps = n_qps;
        ep->session = ep->secret = tpi_random();
        ep->base.ops = &tp_rdma_ops;
        ep->base.ctx = &c->base;
        ep->chunk_max = max_msg && max_msg < RDMA_CHUNK_MAX ? max_msg : RDMA_CHUNK_MAX;
        snprintf(ep->base.peer, sizeof(ep->base.peer), "%s", peer);
        rc = ep_parts(c, ep, par, &step);
        if (rc < 0) {
                rc = err_set(rc, "%s: %s gives no room for another connection (%s): %s", peer, c->port.name, step,
                             strerror(-rc));
                rdma_ep_free(ep);
                return rc;
        }
        *out = ep;
        return 0;
}

/* ---- the greeting ---- */

static void hello_fill(const struct rdma_ctx *c, const struct rdma_ep *ep, const struct rdma_url *par,
                       struct rdma_hello *h)
{
        *h = (struct rdma_hello){
            .link = htole32(ep->gid.link),
            .lid = htole32(c->port.port.lid),
            .psn = htole32((uint32_t)(ep->secret & 0xffffff)),
            .mtu = htole32(par->mtu ? rdma_mtu_of(par->mtu) : c->port.port.active_mtu),
            .window = htole32(ep->window),
            .msg_max = htole32(ep->rx_slot),
            .reads = htole32((uint32_t)c->port.dev.max_qp_rd_atom),
            .reads_out = htole32((uint32_t)c->port.dev.max_qp_init_rd_atom),
            .n_qps = htole32(ep->n_qps),
            .session = htole64(ep->secret),
        };
        memcpy(h->gid, ep->gid.gid.raw, sizeof(h->gid));
        for (unsigned i = 0; i < ep->n_qps; i++)
                h->qpn[i] = htole32(ep->sq[i].qpn);
}

static int hello_check(const struct boot_frame *f, const char *peer, struct rdma_hello *h)
{
        uint32_t window, msg_max, n_qps, mtu;

        if (f->len != sizeof(*h))
                return err_set(-EPROTO, "%s: a greeting of %u bytes, expected %zu", peer, f->len, sizeof(*h));
        memcpy(h, f->payload, sizeof(*h));
        window = le32toh(h->window);
        msg_max = le32toh(h->msg_max);
        n_qps = le32toh(h->n_qps);
        mtu = le32toh(h->mtu);
        if (window < RDMA_WINDOW_MIN || window > RDMA_WINDOW_LIMIT || msg_max < TP_MSG_MAX_LEAST ||
            msg_max > RDMA_MSG_LIMIT || n_qps < 1 || n_qps > RDMA_QPS_MAX || mtu < IBV_MTU_256 || mtu > IBV_MTU_4096 ||
            !h->link || le32toh(h->link) > RDMA_LINK_IWARP)
                return err_set(-EPROTO, "%s: the greeting holds values that no version sends", peer);
        return 0;
}

static uint8_t least(uint32_t a, uint32_t b)
{
        uint32_t n = a < b ? a : b;

        return (uint8_t)(n < 255 ? n : 255);
}

static int sq_to_rtr(struct rdma_ctx *c, struct rdma_ep *ep, unsigned i, const struct rdma_hello *h,
                     const struct rdma_url *par)
{
        struct ibv_qp_attr a = {
            .qp_state = IBV_QPS_RTR,
            .path_mtu = ep->mtu,
            .dest_qp_num = le32toh(h->qpn[i]),
            .rq_psn = le32toh(h->psn),
            .max_dest_rd_atomic = least((uint32_t)c->port.dev.max_qp_rd_atom, le32toh(h->reads_out)),
            .min_rnr_timer = 12,
            .ah_attr = {.dlid = (uint16_t)le32toh(h->lid), .sl = (uint8_t)par->sl, .port_num = c->port.number},
        };

        if (ep->gid.index >= 0) {
                a.ah_attr.is_global = 1;
                memcpy(a.ah_attr.grh.dgid.raw, h->gid, sizeof(h->gid));
                a.ah_attr.grh.sgid_index = (uint8_t)ep->gid.index;
                a.ah_attr.grh.hop_limit = 64;
                a.ah_attr.grh.traffic_class = (uint8_t)par->tc;
        }
        return -ibv_modify_qp(ep->sq[i].qp, &a,
                              IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

static int sq_to_rts(struct rdma_ctx *c, struct rdma_ep *ep, unsigned i, const struct rdma_hello *h,
                     const struct rdma_url *par)
{
        struct ibv_qp_attr a = {
            .qp_state = IBV_QPS_RTS,
            .timeout = (uint8_t)par->timeout,
            .retry_cnt = 7,
            .rnr_retry = 7,
            .sq_psn = (uint32_t)(ep->session & 0xffffff),
            .max_rd_atomic = least((uint32_t)c->port.dev.max_qp_init_rd_atom, le32toh(h->reads)),
        };

        return -ibv_modify_qp(ep->sq[i].qp, &a,
                              IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                  IBV_QP_MAX_QP_RD_ATOMIC);
}

/* The half that needs the peer's greeting. */
static int ep_complete(struct rdma_ctx *c, struct rdma_ep *ep, const struct rdma_hello *h, const struct rdma_url *par)
{
        enum ibv_mtu mine = par->mtu ? rdma_mtu_of(par->mtu) : c->port.port.active_mtu;
        int rc = 0;

        if (le32toh(h->link) != (uint32_t)ep->gid.link || le32toh(h->n_qps) != ep->n_qps)
                return err_set(-EPROTO,
                               "%s: the peer's port speaks another kind of RDMA than %s here, or took another "
                               "number of queue pairs",
                               ep->base.peer, ep->gid.text);
        ep->mtu = mine < (enum ibv_mtu)le32toh(h->mtu) ? mine : (enum ibv_mtu)le32toh(h->mtu);
        if (rdma_mtu_bytes(ep->mtu) > rdma_mtu_bytes(c->port.port.active_mtu))
                ep->mtu = c->port.port.active_mtu;
        ep->credits = ep->peer_window = le32toh(h->window);
        ep->peer_msg_max = le32toh(h->msg_max);
        for (unsigned i = 0; rc == 0 && i < ep->n_qps; i++)
                rc = sq_to_rtr(c, ep, i, h, par);
        rc = rc ? rc : rdma_receive_all(ep);
        for (unsigned i = 0; rc == 0 && i < ep->n_qps; i++)
                rc = sq_to_rts(c, ep, i, h, par);
        if (rc < 0)
                return err_set(rc, "%s: cannot connect queue pair %u by %s: %s", ep->base.peer, ep->sq[0].qpn,
                               ep->gid.text, strerror(-rc));
        ep->secret ^= le64toh(h->session);
        ep->reg_port = (struct rdma_reg_port){.port = c->port.number, .gid_index = ep->gid.index};
        return 0;
}

/* From now on the user knows it. */
static int ep_join(struct rdma_ep *ep)
{
        struct rdma_ctx *c = rdma_ctx_of(ep->base.ctx);
        int rc = ep->fd >= 0 ? epoll_join(c->epfd, ep->fd, &ep->tag) : 0;

        if (rc < 0)
                return err_set(rc, "%s: cannot poll the connection: %s", ep->base.peer, strerror(-rc));
        ep->state = RDMA_EP_LIVE;
        if (ep->n_early == 0) {
                free(ep->early);
                ep->early = NULL;
        } else {
                rdma_todo(ep);
        }
        LIST_ADD(c->eps, ep);
        c->n_eps++;
        rdma_cm_joined(ep);
        return 0;
}

static void rdma_rmem_free(struct tp_rmem *base);
static void rdma_mem_free(struct tp_mem *base);

static void rdma_ep_close(struct tp_ep *base)
{
        struct rdma_ep *ep = rdma_ep_of(base);
        struct rdma_ctx *c = rdma_ctx_of(base->ctx);

        if (ep->cm && ep->state == RDMA_EP_LIVE)
                rdma_cm_progress(c); /* perhaps the peer has gone, and nobody would acknowledge anything */
        if (ep->state == RDMA_EP_LIVE) {
                if (ep->cm)
                        rdma_say_bye(ep);
                rdma_drain(ep, clock_ns() + CLOSE_WAIT_NS);
                if (ep->fd >= 0)
                        boot_send(ep->fd, PROTOCOL, BOOT_BYE, 0, ep->tx_used, NULL, 0);
        }
        if (ep->cm)
                rdma_cm_hang_up(ep);
        ep->state = RDMA_EP_DOWN;
        while (ep->rmems)
                rdma_rmem_free(&ep->rmems->base);
        while (ep->mems)
                rdma_mem_free(&ep->mems->base);
        LIST_DEL(c->eps, ep);
        c->n_eps--;
        rdma_ep_free(ep);
}

/* ---- listening ---- */

static int on_hello(void *arg, int fd, const struct boot_frame *f, void *answer, size_t *answer_len, void **made)
{
        struct rdma_listener *l = arg;
        struct rdma_ctx *c = rdma_ctx_of(l->base.ctx);
        struct rdma_gid theirs = {.index = 0};
        struct rdma_hello h, mine;
        struct rdma_ep *ep;
        char peer[TP_URL_MAX];
        int rc;

        inet_peer_url(fd, "rdma", peer);
        rc = hello_check(f, peer, &h);
        if (rc < 0)
                return rc;
        memcpy(theirs.gid.raw, h.gid, sizeof(h.gid));
        theirs.link = (enum rdma_link)le32toh(h.link);
        rc = rdma_ep_make(c, 1, le32toh(h.n_qps), &l->url, peer, &ep);
        if (rc < 0)
                return rc;
        rc = rdma_gid_choose(&c->port, l->url.gid, fd, &theirs, peer, &ep->gid);
        if (rc == 0) {
                hello_fill(c, ep, &l->url, &mine);
                rc = ep_complete(c, ep, &h, &l->url);
        }
        if (rc < 0) {
                rdma_ep_free(ep);
                return rc;
        }
        memcpy(answer, &mine, sizeof(mine));
        *answer_len = sizeof(mine);
        *made = ep;
        return 0;
}

void rdma_listener_ready(struct rdma_listener *l, struct rdma_ep *ep)
{
        ep->next_ready = NULL;
        *l->ready_end = ep;
        l->ready_end = &ep->next_ready;
        l->n_ready++;
}

static void on_ready(void *arg, int fd, void *made)
{
        struct rdma_ep *ep = made;

        ep->fd = fd;
        rdma_listener_ready(arg, ep);
}

static void on_drop(void *arg, void *made)
{
        rdma_ep_free(made);
}

static int rdma_listen_url(struct tp_ctx *ctx, const char *url, struct tp_listener **out)
{
        struct rdma_ctx *c = rdma_ctx_of(ctx);
        struct rdma_listener *l = calloc(1, sizeof(*l));
        struct boot_serve serve = {
            .protocol = PROTOCOL, .scheme = "rdma", .hello = on_hello, .ready = on_ready, .drop = on_drop, .arg = l};
        struct tp_url u;
        size_t n;
        int rc;

        if (!l)
                return err_set(-ENOMEM, "%s: no memory for a listener", url);
        l->tag = RDMA_TAG_LISTENER;
        l->ready_end = &l->ready;
        l->base.ops = &tp_rdma_ops;
        l->base.ctx = ctx;
        l->url = c->url;
        rc = tpi_url_expect(url, "rdma", &u);
        rc = rc ? rc : rdma_url_read(url, &u, &l->url);
        if (rc == 0 && l->url.cm)
                rc = rdma_cm_listen(c, url, &u, l);
        else
                rc = rc ? rc : boot_listen(url, &u, &serve, &l->boot);
        if (rc == 0 && l->boot && (rc = epoll_join(c->epfd, boot_listener_fd(l->boot), &l->tag)) < 0) {
                boot_listener_close(l->boot);
                rc = err_set(rc, "%s: cannot listen: %s", url, strerror(-rc));
        }
        if (rc < 0) {
                free(l);
                return rc;
        }
        if (l->boot)
                boot_listener_url(l->boot, l->base.url);
        n = strlen(l->base.url);
        if (l->url.qps > 1) /* the connector decides, so whoever connects to our URL is told */
                snprintf(l->base.url + n, sizeof(l->base.url) - n, "?qps=%d", l->url.qps);
        LIST_ADD(c->listeners, l);
        *out = &l->base;
        return 0;
}

static void rdma_listener_close(struct tp_listener *base)
{
        struct rdma_listener *l = container_of(base, struct rdma_listener, base);
        struct rdma_ctx *c = rdma_ctx_of(base->ctx);

        if (l->boot) {
                boot_listener_close(l->boot);
        } else {
                rdma_cm_drop_halves(c, l);
                rdma_cm_listener_free(l);
        }
        while (l->ready) {
                struct rdma_ep *ep = l->ready;

                l->ready = ep->next_ready;
                rdma_ep_free(ep);
        }
        LIST_DEL(c->listeners, l);
        free(l);
}

static int rdma_accept_ready(struct tp_listener *base, struct tp_ep **out)
{
        struct rdma_listener *l = container_of(base, struct rdma_listener, base);
        struct rdma_ep *ep = l->ready;
        int rc;

        if (!ep)
                return -EAGAIN;
        l->ready = ep->next_ready;
        if (!l->ready)
                l->ready_end = &l->ready;
        l->n_ready--;
        rc = ep->state == RDMA_EP_DOWN ? -EAGAIN : ep_join(ep); /* it failed before anybody heard of it */
        if (rc < 0) {
                rdma_ep_free(ep);
                return rc;
        }
        *out = &ep->base;
        return 0;
}

/* ---- connecting ---- */

static void idle_progress(void *arg)
{
        rdma_control(arg);
}

static int connect_over(struct rdma_ctx *c, int fd, const char *url, const struct rdma_url *par, uint64_t deadline_ns,
                        const struct inet_idle *idle, struct rdma_ep *ep)
{
        struct boot_frame answer;
        struct rdma_hello h;
        int rc = rdma_gid_choose(&c->port, par->gid, fd, NULL, url, &ep->gid);

        if (rc < 0)
                return rc;
        hello_fill(c, ep, par, &h);
        rc = boot_exchange(fd, url, PROTOCOL, &h, sizeof(h), deadline_ns, idle, &answer);
        rc = rc ? rc : hello_check(&answer, url, &h);
        rc = rc ? rc : ep_complete(c, ep, &h, par);
        if (rc == 0 && boot_send(fd, PROTOCOL, BOOT_READY, 0, 0, NULL, 0) < 0)
                rc = err_set(-ECONNRESET, "%s: the peer went away while connecting", url);
        return rc;
}

static int connect_boot(struct rdma_ctx *c, const char *url, const struct tp_url *u, const struct rdma_url *par,
                        uint64_t deadline_ns, const struct inet_idle *idle, struct rdma_ep **out)
{
        char peer[TP_URL_MAX];
        int rc, fd = inet_connect(url, u, inet_tune, deadline_ns, idle);

        if (fd < 0)
                return fd;
        inet_peer_url(fd, "rdma", peer);
        rc = rdma_ep_make(c, 0, (unsigned)par->qps, par, peer, out);
        if (rc < 0) {
                close(fd);
                return rc;
        }
        (*out)->fd = fd;
        rc = connect_over(c, fd, url, par, deadline_ns, idle, *out);
        if (rc < 0)
                rdma_ep_free(*out);
        return rc;
}

static int rdma_connect_url(struct tp_ctx *ctx, const char *url, uint64_t deadline_ns, struct tp_ep **out)
{
        struct rdma_ctx *c = rdma_ctx_of(ctx);
        struct inet_idle idle = {.fd = c->listeners ? c->epfd : -1, .progress = idle_progress, .arg = c};
        struct rdma_url par = c->url;
        struct rdma_ep *ep;
        struct tp_url u;
        int rc = tpi_url_expect(url, "rdma", &u);

        rc = rc ? rc : rdma_url_read(url, &u, &par);
        if (rc == 0 && par.cm)
                rc = rdma_cm_connect(c, url, &u, &par, deadline_ns, &idle, &ep);
        else if (rc == 0)
                rc = connect_boot(c, url, &u, &par, deadline_ns, &idle, &ep);
        if (rc < 0)
                return rc;
        rc = ep_join(ep);
        if (rc < 0) {
                rdma_ep_free(ep);
                return rc;
        }
        *out = &ep->base;
        return 0;
}

/* ---- what is told at descriptors ---- */

static void ep_said(struct rdma_ep *ep, const struct boot_frame *f)
{
        switch (f->kind) {
        case BOOT_BYE:
                if (ep->state != RDMA_EP_LIVE || ep->bye)
                        break;
                ep->bye = true;
                ep->bye_count = f->count;
                ep->fall_deadline_ns = clock_ns() + BYE_WAIT_NS;
                rdma_todo(ep);
                break;
        case BOOT_FAIL:
                rdma_fail(ep, f->status ? f->status : -EIO, "%s: the peer gave the connection up: %s", ep->base.peer,
                          f->status == -EACCES ? "an access to its memory that no key allows" : strerror(-f->status));
                break;
        default:
                rdma_fail(ep, -EPROTO, "%s: said something on the bootstrap socket that does not belong there",
                          ep->base.peer);
        }
}

static void ep_listen_to(struct rdma_ctx *c, struct rdma_ep *ep)
{
        struct boot_frame f;
        int rc = 1;

        /* An honest peer says one or two; one that never stops does not keep this thread from the others. */
        for (unsigned i = 0; i < FRAMES_MOST && rc > 0; i++) {
                rc = boot_receive(ep->fd, PROTOCOL, &ep->in, ep->base.peer, &f);
                if (rc > 0)
                        ep_said(ep, &f);
        }
        if (rc >= 0 && ep->state <= RDMA_EP_LIVE)
                return;
        epoll_ctl(c->epfd, EPOLL_CTL_DEL, ep->fd, NULL);
        if (ep->bye || rc >= 0)
                return;
        rdma_fail(ep, -ECONNRESET, "%s: the peer has gone without closing the connection (%s)", ep->base.peer,
                  rc == -EPIPE ? "its process ended" : strerror(-rc));
}

static void channel_clear(struct rdma_ctx *c)
{
        struct ibv_cq *cq;
        void *arg;

        while (ibv_get_cq_event(c->channel, &cq, &arg) == 0)
                ibv_ack_cq_events(cq, 1);
}

static void all_fail(struct rdma_ctx *c, int status, const char *what)
{
        for (struct rdma_ep *ep = c->eps; ep; ep = ep->next)
                rdma_fail(ep, status, "%s: %s: %s", ep->base.peer, c->port.name, what);
}

static void qp_event(struct rdma_ctx *c, const struct ibv_async_event *e)
{
        struct rdma_ep *ep = e->element.qp->qp_context;

        if (!ep) /* one of a registration's probe, which finds out by itself */
                return;
        if (e->event_type == IBV_EVENT_QP_ACCESS_ERR)
                rdma_fail(ep, -EACCES, "%s: queue pair %u: the peer tried to reach memory that no key allows",
                          ep->base.peer, e->element.qp->qp_num);
        else
                rdma_fail(ep, -EIO, "%s: queue pair %u: %s; the device or the peer broke the protocol", ep->base.peer,
                          e->element.qp->qp_num, ibv_event_type_str(e->event_type));
}

static void async_event(struct rdma_ctx *c, const struct ibv_async_event *e)
{
        switch (e->event_type) {
        case IBV_EVENT_QP_FATAL:
        case IBV_EVENT_QP_REQ_ERR:
        case IBV_EVENT_QP_ACCESS_ERR:
        case IBV_EVENT_PATH_MIG_ERR:
                qp_event(c, e);
                break;
        case IBV_EVENT_DEVICE_FATAL:
                all_fail(c, -EIO, "the device has failed");
                break;
        case IBV_EVENT_CQ_ERR:
                all_fail(c, -EIO, "the completion queue overflowed or failed");
                break;
        case IBV_EVENT_PORT_ERR:
                if (e->element.port_num == c->port.number)
                        all_fail(c, -ENETDOWN, "the port went down (cable, switch, or its network interface)");
                break;
        default: /* a queue pair that the GID's change leaves without a path ends in an error of its own */
                log_debug("%s: %s", c->port.name, ibv_event_type_str(e->event_type));
        }
}

static void async_events(struct rdma_ctx *c)
{
        struct ibv_async_event e;

        while (ibv_get_async_event(c->port.verbs, &e) == 0) {
                async_event(c, &e);
                ibv_ack_async_event(&e);
        }
}

static void listener_progress(struct rdma_listener *l)
{
        boot_listener_progress(l->boot, l->n_ready < READY_MAX);
}

void rdma_control(struct rdma_ctx *c)
{
        struct epoll_event got[16];
        int n = epoll_wait(c->epfd, got, ARRAY_LEN(got), 0);

        for (int i = 0; i < n; i++) {
                enum rdma_tag *who = got[i].data.ptr;

                switch (*who) {
                case RDMA_TAG_EP:
                        ep_listen_to(c, container_of(who, struct rdma_ep, tag));
                        break;
                case RDMA_TAG_LISTENER:
                        listener_progress(container_of(who, struct rdma_listener, tag));
                        break;
                case RDMA_TAG_CHANNEL:
                        channel_clear(c);
                        break;
                case RDMA_TAG_ASYNC:
                        async_events(c);
                        break;
                case RDMA_TAG_CM:
                        rdma_cm_progress(c);
                        break;
                }
        }
}

/* ---- memory ---- */

static struct rdma_mem *mem_of(struct tp_mem *mem)
{
        return container_of(mem, struct rdma_mem, base);
}

static int mem_add(struct rdma_ep *ep, const struct mem_region *region, bool owned, struct tp_mem **out)
{
        struct rdma_mem *m = calloc(1, sizeof(*m));
        int rc = 0;

        if (!m)
                return err_set(-ENOMEM, "%s: no memory for a registration", ep->base.peer);
        m->base.ep = &ep->base;
        m->base.region = *region;
        m->base.path = "host";
        m->owned = owned;
        m->host = region->kind == MEM_HOST;
        if (region->len > 0)
                rc = rdma_reg_open(&ep->reg_local, &m->base.region, &m->reg);
        if (rc < 0) {
                free(m);
                return rc;
        }
        if (region->len > 0) {
                m->base.path = m->reg.path;
                memcpy(m->base.why, m->reg.why, sizeof(m->base.why));
        }
        LIST_ADD(ep->mems, m);
        *out = &m->base;
        return 0;
}

static size_t map_bytes(size_t len)
{
        return ALIGN_UP(len ? len : 1, (size_t)sysconf(_SC_PAGESIZE));
}

static int rdma_alloc(struct tp_ep *ep, size_t len, struct tp_mem **out)
{
        struct mem_region r;
        void *addr;
        int rc;

        if (len > SIZE_MAX / 2)
                return err_set(-ENOMEM, "%s: %zu bytes of memory were asked for", ep->peer, len);
        addr = mmap(NULL, map_bytes(len), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (addr == MAP_FAILED)
                return err_set(-ENOMEM, "%s: cannot map %zu bytes: %s", ep->peer, len, strerror(errno));
        r = mem_host_region(addr, len);
        rc = mem_add(rdma_ep_of(ep), &r, true, out);
        if (rc < 0)
                munmap(addr, map_bytes(len));
        return rc;
}

static int rdma_reg(struct tp_ep *ep, const struct mem_region *region, struct tp_mem **out)
{
        return mem_add(rdma_ep_of(ep), region, false, out);
}

static void rdma_mem_free(struct tp_mem *base)
{
        struct rdma_mem *m = mem_of(base);
        struct rdma_ep *ep = rdma_ep_of(base->ep);

        while (m->exports) {
                struct rdma_export *x = m->exports;

                m->exports = x->next;
                rdma_reg_close(&x->reg);
                free(x);
                ep->n_exports--;
        }
        rdma_stage_forget(ep, m);
        rdma_reg_close(&m->reg);
        LIST_DEL(ep->mems, m);
        if (m->owned)
                munmap(base->region.addr, map_bytes(base->region.len));
        free(m);
}

/* A registration of its own for the bytes that a key opens. Device memory takes the path that was found to work. */
static int export_register(struct rdma_mem *m, struct rdma_export *x, size_t off, size_t len)
{
        struct rdma_ep *ep = rdma_ep_of(m->base.ep);
        struct rdma_reg_dev *dev = &ep->reg_remote;

        x->region = m->base.region;
        x->region.addr = (uint8_t *)m->base.region.addr + off;
        x->region.len = len;
        x->region.fd_offset += x->region.fd >= 0 ? off : 0;
        if (!m->host)
                dev->force = m->reg.bounce                     ? TP_GPU_STAGED
                             : !strcmp(m->reg.path, "peermem") ? TP_GPU_PEERMEM
                                                               : TP_GPU_DMABUF;
        return rdma_reg_open(dev, &x->region, &x->reg);
}

static int rdma_export_key(struct tp_mem *mem, size_t off, size_t len, struct tp_key *out)
{
        struct rdma_ep *ep = rdma_ep_of(mem->ep);
        struct rdma_mem *m = mem_of(mem);
        struct tpi_key k = {.magic = KEY_MAGIC, .side = ep->side, .len = len};
        struct rdma_export *x;
        int rc;

        if (!tpi_inside(off, len, mem->region.len))
                return err_set(-ERANGE, "%s: a key for bytes %zu+%zu of memory that has %zu", mem->ep->peer, off, len,
                               mem->region.len);
        if (ep->n_exports >= RDMA_EXPORTS_MAX)
                return err_set(-ENOSPC, "%s: %u keys are live; free memory first", mem->ep->peer, RDMA_EXPORTS_MAX);
        x = calloc(1, sizeof(*x));
        if (!x)
                return err_set(-ENOMEM, "%s: no memory for a key", mem->ep->peer);
        rc = len > 0 ? export_register(m, x, off, len) : 0;
        if (rc < 0) {
                free(x);
                return err_trail(rc, "while making a key");
        }
        k.slot = x->reg.mr.rkey;
        k.off = x->reg.iova;
        x->next = m->exports;
        m->exports = x;
        ep->n_exports++;
        k.epoch = ++ep->serial << RDMA_KEY_FLAG_BITS | (x->reg.bounce ? RDMA_KEY_STAGED : 0);
        k.serial = tpi_random();
        tpi_key_seal(out, &k, ep->secret);
        return 0;
}

static int rdma_import_key(struct tp_ep *base, const struct tp_key *key, uint64_t deadline_ns, struct tp_rmem **out)
{
        struct rdma_ep *ep = rdma_ep_of(base);
        struct rdma_rmem *r;
        struct tpi_key k;
        int rc = tpi_key_open(key, ep->secret, KEY_MAGIC, !ep->side, &k);

        if (rc == 0 && (k.slot > UINT32_MAX || k.len > UINT64_MAX - k.off))
                rc = err_set(-EACCES, "memory key: it opens what no memory has");
        if (rc < 0)
                return err_trail(rc, "while importing a key from %s", base->peer);
        r = calloc(1, sizeof(*r));
        if (!r)
                return err_set(-ENOMEM, "%s: no memory for an imported key", base->peer);
        r->base.ep = base;
        r->base.len = k.len;
        r->addr = k.off;
        r->rkey = (uint32_t)k.slot;
        r->staged = k.epoch & RDMA_KEY_STAGED;
        LIST_ADD(ep->rmems, r);
        *out = &r->base;
        return 0;
}

static void rdma_rmem_free(struct tp_rmem *base)
{
        struct rdma_rmem *r = container_of(base, struct rdma_rmem, base);
        struct rdma_ep *ep = rdma_ep_of(base->ep);

        LIST_DEL(ep->rmems, r);
        free(r);
}

/* ---- the rest ---- */

static void rdma_attr(const struct tp_ep *base, struct tp_attr *out)
{
        const struct rdma_ep *ep = container_of(base, const struct rdma_ep, base);
        const struct rdma_ctx *c = container_of(base->ctx, const struct rdma_ctx, base);
        double rate = c->port.link_bits_per_s > 0 ? c->port.link_bits_per_s / 8 : 0;

        *out = (struct tp_attr){
            .name = "rdma",
            .msg_max = ep->peer_msg_max,
            .rdma_max = ep->chunk_max,
            .one_sided = true,
            .emulated = c->port.emulated,
            .driver_copies = c->port.driver_copies,
            .expected_latency_ns = c->port.emulated ? 30000 : 2000,
            .expected_bytes_per_s = c->port.emulated || rate <= 0 ? 1e9 : 0.9 * rate,
            .tx_depth = ep->sq[0].depth - RDMA_SQ_RESERVE,
            .numa = c->port.numa,
            .link_bits_per_s = c->port.link_bits_per_s,
            .mtu = rdma_mtu_bytes(ep->mtu),
        };
        snprintf(out->device, sizeof(out->device), "%s", c->port.name);
        snprintf(out->netdev, sizeof(out->netdev), "%s", ep->gid.netdev);
        snprintf(out->detail, sizeof(out->detail), "RC, %u QP%s, %s, inline %u, window %u, %s, %s", ep->n_qps,
                 ep->n_qps > 1 ? "s" : "", ep->gid.text, ep->inline_max, ep->window,
                 ep->sq[0].ex ? "ibv_wr" : "ibv_post_send", ep->cm ? "rdma_cm" : "bootstrap");
}

/* For fault.c: the queue pairs fail, and the bootstrap's socket ends at both sides. */
static void rdma_sever(struct tp_ep *base)
{
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
        struct rdma_ep *ep = rdma_ep_of(base);

        for (unsigned i = 0; i < ep->n_qps; i++)
                ibv_modify_qp(ep->sq[i].qp, &attr, IBV_QP_STATE);
        if (ep->fd >= 0)
                shutdown(ep->fd, SHUT_RDWR);
        else
                rdma_cm_hang_up(ep);
}

const struct tp_ops tp_rdma_ops = {
    .name = "rdma",
    .unavailable = rdma_unavailable,
    .open = rdma_open,
    .close = rdma_close,
    .listen = rdma_listen_url,
    .listener_close = rdma_listener_close,
    .accept = rdma_accept_ready,
    .connect = rdma_connect_url,
    .ep_close = rdma_ep_close,
    .attr = rdma_attr,
    .alloc = rdma_alloc,
    .reg = rdma_reg,
    .free = rdma_mem_free,
    .export_key = rdma_export_key,
    .import_key = rdma_import_key,
    .rmem_free = rdma_rmem_free,
    .poll = rdma_poll,
    .fd = rdma_fd,
    .arm = rdma_arm,
    .disarm = rdma_disarm,
    .send = rdma_send,
    .release = rdma_release,
    .write = rdma_write,
    .write_imm = rdma_write_imm,
    .read = rdma_read,
    .cancel = rdma_cancel,
    .sever = rdma_sever,
};
