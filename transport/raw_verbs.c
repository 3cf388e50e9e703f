/*
 * raw over rdma: one bare reliable connection (RC), its work requests made before the clock starts, ibv_post_send, and
 * one completion queue that is polled. Each end registers one piece of memory: a page of control words, the message that
 * it sends, and as many slots as there may be messages in flight.
 *
 *   exchange, SEND    as ib_send_lat: what comes is seen as the completion of a receive;
 *   exchange, WRITE   as ib_write_lat: what comes is seen by polling its last byte, which therefore counts;
 *   stream, SEND      receives are posted before the window that may use them is told, so that a receiver is never late
 *                     (RNR); the window is told by writing a control word, once in half a depth;
 *   stream, WRITE     the window is what the other end's device acknowledged; one SEND says that all is there;
 *   READ              the driver reads, one by one or `depth` at a time; the other end only waits for the last word.
 *
 * Messages up to the device's limit travel in the work request. Streams are posted in short lists: one call, one
 * doorbell, one completion each. Before each order both ends post what it needs and then write to each other's control
 * page that they are ready.
 */
#include <endian.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "clock.h"
#include "err.h"
#include "mem_region.h"
#include "inside.h"
#include "raw_inside.h"
#include "rdma_private.h"
#include "rdma_reg.h"

#define LIST      16u /* work requests in one call, at most */
#define SQ_WANTED 1024u
#define RQ_WANTED 1024u
#define RQ_LATENT 64u /* receives kept posted during an exchange */
#define SIGNAL    32u /* one of so many single posts asks for a completion */
#define SPINS     512u
#define WCS       16
#define CTL_BYTES 4096u
#define LINE(x)   ALIGN_UP((x), (size_t)CACHE_LINE)

/* Written by the other end, each on a line of its own. */
struct verbs_ctl {
        struct {
                _Alignas(CACHE_LINE) _Atomic uint64_t v;
        } ready, credit,
            done; /* orders it is ready for; messages of this stream it has taken; orders it is done with */
        struct {
                _Alignas(CACHE_LINE) uint64_t v;
        } out[3]; /* where ours travel from, when they do not fit the work request */
};

enum ctl_word { CTL_READY, CTL_CREDIT, CTL_DONE };

_Static_assert(sizeof(struct verbs_ctl) <= CTL_BYTES, "a page");

struct verbs_blob {  /* little endian */
        uint64_t va; /* of the control page; what follows it lies behind it */
        uint64_t tx_bytes, rx_bytes;
        uint32_t rkey, qpn, psn, recvs; /* recvs: how many can be posted */
        uint16_t lid;
        uint8_t gid[16];
        uint8_t link, mtu, rd_atomic, zero[3];
};

_Static_assert(sizeof(struct verbs_blob) <= RAW_BLOB_BYTES, "a blob's room");

struct verbs_end {
        struct raw_end base; /* first */
        struct rdma_port port;
        struct rdma_url par;
        struct rdma_gid gid;
        struct ibv_pd *pd;
        struct ibv_cq *cq;
        struct ibv_qp *qp;
        struct mem_region region;
        struct rdma_reg_dev reg_dev;
        struct rdma_reg reg;
        struct verbs_ctl *ctl;
        uint8_t *area, *tx, *rx; /* area is the control page */
        size_t area_bytes, tx_bytes, rx_bytes;
        uint32_t sq_room, rq_room, inline_max, psn;
        bool answered;          /* not offered */
        struct verbs_blob peer; /* in the host's byte order */
        uint64_t orders;
        uint64_t posted, acked, signalled; /* work requests sent: so many, done of these, the last that asks */
        uint64_t received, receives;       /* receives of this order: completed, posted */
        struct ibv_send_wr wr[LIST];
        struct ibv_sge sge[LIST];
        struct ibv_recv_wr rwr[LIST];
        struct ibv_sge rsge[LIST];
};

static struct verbs_end *end_of(struct raw_end *e)
{
        return container_of(e, struct verbs_end, base);
}

/* ---- making an end ---- */

static void verbs_free(struct raw_end *base)
{
        struct verbs_end *e = end_of(base);

        if (e->qp)
                ibv_destroy_qp(e->qp);
        if (e->cq)
                ibv_destroy_cq(e->cq);
        rdma_reg_close(&e->reg);
        if (e->pd)
                ibv_dealloc_pd(e->pd);
        if (e->port.verbs)
                ibv_close_device(e->port.verbs);
        if (e->area)
                munmap(e->area, e->area_bytes);
        free(e);
}

static int make_area(struct verbs_end *e, const struct raw_opts *o)
{
        void *p = MAP_FAILED;

        e->tx_bytes = LINE(o->max_bytes);
        if (o->max_bytes < SIZE_MAX / 2 && size_mul(e->tx_bytes, o->depth, &e->rx_bytes) &&
            size_add(e->rx_bytes, e->tx_bytes + CTL_BYTES, &e->area_bytes))
                p = mmap(NULL, e->area_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1,
                         0);
        if (p == MAP_FAILED)
                return err_set(-ENOMEM, "raw %s: no memory for %u messages of %zu bytes", o->url, o->depth,
                               o->max_bytes);
        madvise(p, e->area_bytes, MADV_DONTFORK);
        e->area = p;
        e->ctl = p;
        e->tx = e->area + CTL_BYTES;
        e->rx = e->tx + e->tx_bytes;
        return 0;
}

static int register_area(struct verbs_end *e)
{
        e->region = mem_host_region(e->area, e->area_bytes);
        e->reg_dev = (struct rdma_reg_dev){.p = &rdma_reg_verbs, .pd = e->pd, .max_mr_bytes = e->port.dev.max_mr_size};
        e->reg_dev.access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
        memcpy(e->reg_dev.name, e->port.name, sizeof(e->reg_dev.name));
        return rdma_reg_open(&e->reg_dev, &e->region, &e->reg);
}

static uint32_t at_most(int limit, uint32_t wanted)
{
        return limit > 0 && (uint32_t)limit < wanted ? (uint32_t)limit : wanted;
}

/* Providers refuse more inline room than they have instead of granting less. */
static int make_qp(struct verbs_end *e, const struct raw_opts *o)
{
        static const uint32_t inline_tries[] = {220, 128, 64, 0};
        struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_RC};

        e->sq_room = at_most(e->port.dev.max_qp_wr, SQ_WANTED);
        e->rq_room = at_most(e->port.dev.max_qp_wr, RQ_WANTED);
        e->cq = ibv_create_cq(e->port.verbs, (int)at_most(e->port.dev.max_cqe, e->sq_room + e->rq_room), NULL, NULL, 0);
        for (size_t i = 0; e->cq && !e->qp && i < ARRAY_LEN(inline_tries); i++) {
                init.send_cq = init.recv_cq = e->cq;
                init.cap = (struct ibv_qp_cap){.max_send_wr = e->sq_room,
                                               .max_recv_wr = e->rq_room,
                                               .max_send_sge = 1,
                                               .max_recv_sge = 1,
                                               .max_inline_data = inline_tries[i]};
                e->qp = ibv_create_qp(e->pd, &init);
        }
        if (!e->qp)
                return err_set(-errno, "raw %s: %s makes no queue pair of %u requests: %s", o->url, e->port.name,
                               e->sq_room, strerror(errno));
        e->inline_max = init.cap.max_inline_data;
        return 0;
}

/* The parameters of a URL; of a bare scheme there are none. */
static int read_url(const char *url, struct tp_url *u, struct rdma_url *par)
{
        int rc = 0;

        *u = (struct tp_url){.scheme = "rdma"};
        if (strstr(url, "://"))
                rc = tpi_url_expect(url, "rdma", u);
        return rc ? rc : rdma_url_read(url, u, par);
}

static void blob_make(const struct verbs_end *e, struct raw_blob *out)
{
        struct verbs_blob b = {
            .va = htole64(e->reg.iova),
            .tx_bytes = htole64(e->tx_bytes),
            .rx_bytes = htole64(e->rx_bytes),
            .rkey = htole32(e->reg.mr.rkey),
            .qpn = htole32(e->qp->qp_num),
            .psn = htole32(e->psn),
            .recvs = htole32(e->rq_room),
            .lid = htole16(e->port.port.lid),
            .link = (uint8_t)e->gid.link,
            .mtu = (uint8_t)e->port.port.active_mtu,
            .rd_atomic = (uint8_t)at_most(e->port.dev.max_qp_rd_atom, 16),
        };

        memcpy(b.gid, e->gid.gid.raw, sizeof(b.gid));
        memcpy(out->bytes, &b, sizeof(b));
}

static int blob_read(const char *url, const struct raw_blob *in, struct verbs_blob *b)
{
        memcpy(b, in->bytes, sizeof(*b));
        b->va = le64toh(b->va);
        b->tx_bytes = le64toh(b->tx_bytes);
        b->rx_bytes = le64toh(b->rx_bytes);
        b->rkey = le32toh(b->rkey);
        b->qpn = le32toh(b->qpn);
        b->psn = le32toh(b->psn);
        b->recvs = le32toh(b->recvs);
        b->lid = le16toh(b->lid);
        if (b->link < RDMA_LINK_IB || b->link > RDMA_LINK_IWARP || b->mtu < IBV_MTU_256 || b->mtu > IBV_MTU_4096 ||
            b->recvs == 0 || b->rd_atomic == 0 || b->tx_bytes == 0 || b->rx_bytes == 0)
                return err_set(-EPROTO, "raw %s: what the other end sent is no address of a queue pair", url);
        return 0;
}

static int end_init(struct verbs_end *e, const struct raw_opts *o, const struct rdma_gid *want)
{
        struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT};
        struct tp_url u;
        int rc = read_url(o->url, &u, &e->par);

        rc = rc ? rc : rdma_port_open(o->url, &u, &e->par, &e->port);
        rc = rc ? rc : rdma_gid_choose(&e->port, e->par.gid, -1, want, o->url, &e->gid);
        rc = rc ? rc : make_area(e, o);
        if (rc)
                return rc;
        e->pd = ibv_alloc_pd(e->port.verbs);
        if (!e->pd)
                return err_set(-errno, "raw %s: %s gives no protection domain: %s", o->url, e->port.name,
                               strerror(errno));
        rc = register_area(e);
        rc = rc ? rc : make_qp(e, o);
        if (rc)
                return rc;
        e->psn = (uint32_t)tpi_random() & 0xffffff;
        a.port_num = e->port.number;
        a.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
        rc = ibv_modify_qp(e->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
        return rc ? err_set(-rc, "raw %s: %s: queue pair to INIT: %s", o->url, e->port.name, strerror(rc)) : 0;
}

static int end_new(const struct raw_opts *o, const struct rdma_gid *want, struct verbs_end **out)
{
        struct verbs_end *e = calloc(1, sizeof(*e));
        int rc = e ? end_init(e, o, want) : err_set(-ENOMEM, "raw %s: no memory", o->url);

        if (rc < 0) {
                if (e)
                        verbs_free(&e->base);
                return rc;
        }
        *out = e;
        return 0;
}

/* ---- meeting ---- */

static int to_rtr(struct verbs_end *e)
{
        const struct verbs_blob *p = &e->peer;
        struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTR, .dest_qp_num = p->qpn, .rq_psn = p->psn};
        unsigned mtu = e->port.port.active_mtu;

        mtu = p->mtu < mtu ? p->mtu : mtu;
        if (e->par.mtu && rdma_mtu_of(e->par.mtu) < mtu)
                mtu = rdma_mtu_of(e->par.mtu);
        a.path_mtu = (enum ibv_mtu)mtu;
        a.max_dest_rd_atomic = (uint8_t)at_most(e->port.dev.max_qp_rd_atom, p->rd_atomic);
        a.min_rnr_timer = 1;
        a.ah_attr.port_num = e->port.number;
        a.ah_attr.dlid = p->lid;
        a.ah_attr.sl = (uint8_t)e->par.sl;
        if (e->gid.index >= 0) {
                a.ah_attr.is_global = 1;
                memcpy(a.ah_attr.grh.dgid.raw, p->gid, sizeof(p->gid));
                a.ah_attr.grh.sgid_index = (uint8_t)e->gid.index;
                a.ah_attr.grh.hop_limit = 64;
                a.ah_attr.grh.traffic_class = (uint8_t)e->par.tc;
        }
        return ibv_modify_qp(e->qp, &a,
                             IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                 IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

static int end_connect(struct verbs_end *e, const char *url)
{
        struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTS, .sq_psn = e->psn, .retry_cnt = 7, .rnr_retry = 7};
        int rc = to_rtr(e);

        if (rc)
                return err_set(-rc, "raw %s: %s, %s: queue pair to RTR: %s; does the GID lead to the other end?", url,
                               e->port.name, e->gid.text, strerror(rc));
        a.timeout = (uint8_t)e->par.timeout;
        a.max_rd_atomic = (uint8_t)at_most(e->port.dev.max_qp_init_rd_atom, e->peer.rd_atomic);
        rc = ibv_modify_qp(e->qp, &a,
                           IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                               IBV_QP_MAX_QP_RD_ATOMIC);
        return rc ? err_set(-rc, "raw %s: %s: queue pair to RTS: %s", url, e->port.name, strerror(rc)) : 0;
}

static int verbs_offer(const struct raw_opts *o, struct raw_blob *offer, struct raw_end **out)
{
        struct verbs_end *e;
        int rc = end_new(o, NULL, &e);

        if (rc < 0)
                return rc;
        blob_make(e, offer);
        *out = &e->base;
        return 0;
}

static int verbs_answer(const struct raw_opts *o, const struct raw_blob *offer, struct raw_blob *answer,
                        struct raw_end **out)
{
        struct rdma_gid want = {.index = -1};
        struct verbs_blob peer;
        struct verbs_end *e;
        int rc = blob_read(o->url, offer, &peer);

        if (rc < 0)
                return rc;
        want.link = (enum rdma_link)peer.link;
        memcpy(want.gid.raw, peer.gid, sizeof(peer.gid));
        rc = end_new(o, &want, &e);
        if (rc < 0)
                return rc;
        e->peer = peer;
        e->answered = true;
        rc = end_connect(e, o->url);
        if (rc < 0) {
                verbs_free(&e->base);
                return rc;
        }
        blob_make(e, answer);
        *out = &e->base;
        return 0;
}

static int verbs_settle(struct raw_end *base, const struct raw_blob *answer)
{
        struct verbs_end *e = end_of(base);
        int rc = blob_read(base->o.url, answer, &e->peer);

        return rc ? rc : end_connect(e, base->o.url);
}

/* ---- completions ---- */

static __attribute__((cold, noinline)) int failed(struct verbs_end *e, const struct ibv_wc *wc)
{
        return err_set(-ECONNRESET, "raw %s: queue pair %u of %s: %s%s", e->base.o.url, e->qp->qp_num, e->port.name,
                       ibv_wc_status_str(wc->status),
                       wc->status == IBV_WC_RETRY_EXC_ERR ? ": the other end is gone or cannot be reached" : "");
}

static __attribute__((cold, noinline)) int not_posted(struct verbs_end *e, int error)
{
        return err_set(-error, "raw %s: queue pair %u of %s takes no work request: %s", e->base.o.url, e->qp->qp_num,
                       e->port.name, strerror(error));
}

/* How many completions there were, or -errno. */
static inline int poll_cq(struct verbs_end *e)
{
        struct ibv_wc wc[WCS];
        int n = ibv_poll_cq(e->cq, WCS, wc);

        for (int i = 0; i < n; i++) {
                if (wc[i].status != IBV_WC_SUCCESS)
                        return failed(e, &wc[i]);
                if (wc[i].opcode & IBV_WC_RECV)
                        e->received++;
                else
                        e->acked = wc[i].wr_id;
        }
        return n;
}

/* Waits for a completion, whatever it is. vain: the caller's count of polls that found nothing. */
static inline int wait_cq(struct verbs_end *e, unsigned *vain)
{
        int n = poll_cq(e);

        if (n > 0) {
                *vain = 0;
                raw_moved(&e->base);
                return 0;
        }
        return n < 0 ? n : ++*vain < SPINS ? 0 : raw_idle(&e->base);
}

/* ---- posting ---- */

static inline int post_list(struct verbs_end *e, unsigned n)
{
        struct ibv_send_wr *bad;
        int rc;

        e->posted += n;
        rc = ibv_post_send(e->qp, e->wr, &bad);
        return rc ? not_posted(e, rc) : 0;
}

/* Room in the send queue for n more, and one for a control word. */
static int make_room(struct verbs_end *e, unsigned n)
{
        unsigned vain = 0;
        int rc = 0;

        while (!rc && e->posted - e->acked + n + 1 > e->sq_room)
                rc = wait_cq(e, &vain);
        return rc;
}

/* One work request that was made beforehand. */
static inline int post_one(struct verbs_end *e)
{
        e->wr[0].wr_id = e->posted + 1;
        e->wr[0].send_flags &= ~(unsigned)IBV_SEND_SIGNALED;
        if (e->posted + 1 - e->signalled >= SIGNAL) {
                e->wr[0].send_flags |= IBV_SEND_SIGNALED;
                e->signalled = e->posted + 1;
                if (e->posted - e->acked + 2 * SIGNAL > e->sq_room) {
                        int rc = make_room(e, SIGNAL);

                        if (rc)
                                return rc;
                }
        }
        return post_list(e, 1);
}

/* Writes a word into the other end's control page. Always asks for a completion, so that what went before is known to
 * be done, too. */
static int tell(struct verbs_end *e, enum ctl_word word, uint64_t value)
{
        static const size_t at[] = {offsetof(struct verbs_ctl, ready), offsetof(struct verbs_ctl, credit),
                                    offsetof(struct verbs_ctl, done)};
        struct ibv_sge sge = {.addr = (uintptr_t)&e->ctl->out[word].v, .length = 8, .lkey = e->reg.mr.lkey};
        struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE}, *bad;
        int rc = make_room(e, 0);

        if (rc)
                return rc;
        e->ctl->out[word].v = value;
        wr.wr_id = e->signalled = ++e->posted;
        wr.send_flags = IBV_SEND_SIGNALED | (e->inline_max >= sizeof(value) ? IBV_SEND_INLINE : 0);
        wr.wr.rdma.remote_addr = e->peer.va + at[word];
        wr.wr.rdma.rkey = e->peer.rkey;
        rc = ibv_post_send(e->qp, &wr, &bad);
        return rc ? not_posted(e, rc) : 0;
}

/* n receives, n <= LIST: into one slot, or into those that come next of `slots`. */
static int post_receives(struct verbs_end *e, unsigned n, size_t size, uint64_t slots)
{
        struct ibv_recv_wr *bad;
        int rc;

        for (unsigned i = 0; i < n; i++) {
                e->rsge[i] = (struct ibv_sge){(uintptr_t)e->rx + (e->receives + i) % slots * LINE(size), (uint32_t)size,
                                              e->reg.mr.lkey};
                e->rwr[i] = (struct ibv_recv_wr){
                    .next = i + 1 < n ? &e->rwr[i + 1] : NULL, .sg_list = &e->rsge[i], .num_sge = size ? 1 : 0};
        }
        e->receives += n;
        rc = ibv_post_recv(e->qp, e->rwr, &bad);
        return rc ? not_posted(e, rc) : 0;
}

static int post_receives_to(struct verbs_end *e, uint64_t until, size_t size, uint64_t slots)
{
        int rc = 0;

        while (!rc && e->receives < until)
                rc = post_receives(e, until - e->receives < LIST ? (unsigned)(until - e->receives) : LIST, size, slots);
        return rc;
}

/* ---- orders ---- */

static int await_word(struct verbs_end *e, const _Atomic uint64_t *word, uint64_t value)
{
        unsigned vain = 0;
        int rc = 0;

        while (!rc && atomic_load_explicit(word, memory_order_acquire) < value)
                rc = wait_cq(e, &vain);
        return rc;
}

/* Everything was posted that the other end may meet; waits until it says the same. Who offered speaks first: what is
 * sent to a queue pair that does not listen yet is thrown away, and some devices do not find back from that. */
static int line_up(struct verbs_end *e)
{
        uint64_t order = ++e->orders;
        int rc = e->answered ? await_word(e, &e->ctl->ready.v, order) : 0;

        rc = rc ? rc : tell(e, CTL_READY, order);
        rc = rc ? rc : await_word(e, &e->ctl->ready.v, order);
        e->base.started_ns = clock_ns();
        return rc;
}

static void order_begin(struct verbs_end *e)
{
        e->received = e->receives = 0;
        atomic_store_explicit(&e->ctl->credit.v, 0, memory_order_relaxed);
}

/* Until everything that we posted is acknowledged. */
static int drain(struct verbs_end *e)
{
        unsigned vain = 0;
        int rc = tell(e, CTL_DONE, e->orders);

        while (!rc && e->acked < e->posted)
                rc = wait_cq(e, &vain);
        return rc;
}

static uint64_t peer_rx(const struct verbs_end *e)
{
        return e->peer.va + CTL_BYTES + e->peer.tx_bytes;
}

/* The work requests of an order, as far as they are known. n <= LIST. */
static void prepare(struct verbs_end *e, enum ibv_wr_opcode opcode, size_t size, unsigned n)
{
        bool fits = opcode != IBV_WR_RDMA_READ && size <= e->inline_max;

        for (unsigned i = 0; i < n; i++) {
                e->sge[i] = (struct ibv_sge){(uintptr_t)e->tx, (uint32_t)size, e->reg.mr.lkey};
                e->wr[i] = (struct ibv_send_wr){.sg_list = &e->sge[i], .num_sge = size ? 1 : 0, .opcode = opcode};
                e->wr[i].send_flags = fits ? IBV_SEND_INLINE : 0;
                e->wr[i].wr.rdma.remote_addr = peer_rx(e);
                e->wr[i].wr.rdma.rkey = e->peer.rkey;
        }
}

/* A write of no bytes would change nothing that could be seen: one byte stands for it. */
static size_t written(size_t size)
{
        return size ? size : 1;
}

/* ---- exchange by SEND ---- */

static inline int await_message(struct verbs_end *e, uint64_t n)
{
        unsigned vain = 0;
        int rc = 0;

        while (!rc && e->received < n)
                rc = wait_cq(e, &vain);
        return rc;
}

/* Receives are posted again in lists, after the answer is on its way. */
static inline int refill(struct verbs_end *e, uint64_t n, size_t size)
{
        uint64_t left = n - e->receives;

        if (e->receives - e->received > RQ_LATENT / 2 || left == 0)
                return 0;
        return post_receives(e, left < LIST ? (unsigned)left : LIST, size, 1);
}

static int send_exchange(struct verbs_end *e, uint64_t n, size_t out, size_t in, bool drives, void *dst,
                         struct hist *round_trips)
{
        uint64_t first = n < RQ_LATENT ? n : RQ_LATENT, t0, t1;
        int rc = post_receives_to(e, first < e->rq_room ? first : e->rq_room, in, 1);

        prepare(e, IBV_WR_SEND, out, 1);
        rc = rc ? rc : line_up(e);
        t0 = clock_stamp();
        for (uint64_t i = 0; i < n && !rc; i++) {
                if (drives)
                        rc = post_one(e);
                rc = rc ? rc : await_message(e, i + 1);
                mem_look(e->rx, in);
                if (!drives)
                        rc = rc ? rc : post_one(e);
                rc = rc ? rc : refill(e, n, in);
                if (dst)
                        memcpy(dst, e->rx, in);
                if (round_trips) {
                        t1 = clock_stamp();
                        hist_add(round_trips, clock_stamp_ns(t0, t1));
                        t0 = t1;
                }
        }
        return rc;
}

/* ---- exchange by WRITE ---- */

static inline int await_byte(struct verbs_end *e, const _Atomic uint8_t *at, uint8_t value)
{
        for (unsigned vain = 0; atomic_load_explicit(at, memory_order_acquire) != value;) {
                /* The completion queue tells when the connection breaks. */
                int rc = ++vain % SPINS ? 0 : poll_cq(e);

                rc = rc < 0 || vain < SPINS ? rc : raw_idle(&e->base);
                if (rc < 0)
                        return rc;
        }
        return 0;
}

static int write_exchange(struct verbs_end *e, uint64_t n, size_t out, size_t in, bool drives, void *dst,
                          struct hist *round_trips)
{
        _Atomic uint8_t *seen = (_Atomic uint8_t *)(e->rx + written(in) - 1);
        uint8_t *mark = e->tx + written(out) - 1;
        uint64_t t0, t1;
        int rc;

        atomic_store_explicit(seen, 0, memory_order_relaxed);
        prepare(e, IBV_WR_RDMA_WRITE, written(out), 1);
        rc = line_up(e);
        t0 = clock_stamp();
        for (uint64_t i = 1; i <= n && !rc; i++) {
                *mark = (uint8_t)i;
                if (drives)
                        rc = post_one(e);
                rc = rc ? rc : await_byte(e, seen, (uint8_t)i);
                if (!drives)
                        rc = rc ? rc : post_one(e);
                if (i % SIGNAL == 0 && !rc)
                        rc = poll_cq(e) < 0 ? -ECONNRESET : 0;
                if (dst)
                        memcpy(dst, e->rx, in);
                raw_moved(&e->base);
                if (round_trips) {
                        t1 = clock_stamp();
                        hist_add(round_trips, clock_stamp_ns(t0, t1));
                        t0 = t1;
                }
        }
        return rc;
}

/* ---- streams: what drives ---- */

/* A stream in flight: how many may be, how many are. */
struct stream {
        uint64_t n, window, slots, sent;
        unsigned list; /* posted in lists of so many */
        size_t size, stride;
        uint64_t remote, local; /* address of slot 0; READ: local slots turn, too */
        bool read;
};

/* Posts the next list; k <= LIST. Only its last request asks for a completion. */
static int post_stream(struct verbs_end *e, struct stream *s, unsigned k)
{
        int rc;

        for (unsigned i = 0; i < k; i++) {
                uint64_t slot = (s->sent + i) % s->slots * s->stride;

                e->wr[i].wr.rdma.remote_addr = s->read ? s->remote : s->remote + slot;
                if (s->read)
                        e->sge[i].addr = s->local + slot;
                e->wr[i].next = i + 1 < k ? &e->wr[i + 1] : NULL;
                e->wr[i].send_flags &= ~(unsigned)IBV_SEND_SIGNALED;
        }
        e->wr[k - 1].send_flags |= IBV_SEND_SIGNALED;
        e->wr[k - 1].wr_id = e->signalled = e->posted + k;
        rc = post_list(e, k);
        s->sent += k;
        return rc;
}

/* confirmed: how many messages are out of the window. */
static int drive_window(struct verbs_end *e, struct stream *s,
                        uint64_t (*confirmed)(struct verbs_end *, struct stream *))
{
        unsigned vain = 0;
        int rc = 0;

        while (!rc && s->sent < s->n) {
                uint64_t left = s->n - s->sent;
                unsigned k = left < s->list ? (unsigned)left : s->list;

                if (s->sent - confirmed(e, s) + k <= s->window && e->posted - e->acked + k + 1 <= e->sq_room)
                        rc = post_stream(e, s, k);
                else
                        rc = wait_cq(e, &vain);
        }
        return rc;
}

static uint64_t by_credit(struct verbs_end *e, struct stream *s)
{
        return atomic_load_explicit(&e->ctl->credit.v, memory_order_acquire);
}

static uint64_t by_ack(struct verbs_end *e, struct stream *s)
{
        return s->sent - (e->posted - e->acked);
}

/* Lists must be short enough that several are in flight. */
static struct stream stream_of(const struct verbs_end *e, const struct raw_order *o, size_t size, uint64_t window)
{
        struct stream s = {.n = o->n, .size = size, .stride = LINE(written(size)), .remote = peer_rx(e)};

        s.window = window < e->sq_room / 2 ? window : e->sq_room / 2;
        s.list = s.window / 4 < LIST ? (unsigned)(s.window / 4) : LIST;
        s.list = s.list ? s.list : 1;
        s.slots = e->peer.rx_bytes / s.stride;
        s.slots = o->slots && o->slots < s.slots ? o->slots : s.slots;
        s.slots = s.slots < s.window ? s.slots : s.window;
        s.slots = s.slots ? s.slots : 1;
        return s;
}

/* Both ends reckon with the same window. */
static uint64_t send_window(const struct raw_order *o, uint32_t receiver_room)
{
        return o->depth < receiver_room ? o->depth : receiver_room;
}

static int drive_send_stream(struct verbs_end *e, const struct raw_order *o)
{
        struct stream s = stream_of(e, o, o->up, send_window(o, e->peer.recvs));
        int rc;

        prepare(e, IBV_WR_SEND, o->up, LIST);
        rc = line_up(e);
        rc = rc ? rc : drive_window(e, &s, by_credit);
        return rc ? rc : await_word(e, &e->ctl->credit.v, o->n);
}

static int drive_write_stream(struct verbs_end *e, const struct raw_order *o)
{
        struct stream s = stream_of(e, o, o->up, o->depth);
        int rc;

        prepare(e, IBV_WR_RDMA_WRITE, o->up, LIST);
        rc = line_up(e);
        rc = rc ? rc : drive_window(e, &s, by_ack);
        rc = rc ? rc : make_room(e, 1);
        prepare(e, IBV_WR_SEND, 0, 1);
        rc = rc ? rc : post_one(e);
        return rc ? rc : await_word(e, &e->ctl->credit.v, o->n);
}

static int drive_reads(struct verbs_end *e, const struct raw_order *o, void *dst, struct hist *round_trips)
{
        struct stream s = stream_of(e, o, o->up, o->shape == RAW_STREAM ? o->depth : 1);
        unsigned vain = 0;
        uint64_t t0, t1;
        int rc;

        s.read = true;
        s.slots = s.window < e->rx_bytes / s.stride ? s.window : e->rx_bytes / s.stride;
        s.remote = e->peer.va + CTL_BYTES;
        s.local = (uintptr_t)e->rx;
        prepare(e, IBV_WR_RDMA_READ, o->up, LIST);
        rc = line_up(e);
        t0 = clock_stamp();
        if (o->shape == RAW_STREAM)
                rc = rc ? rc : drive_window(e, &s, by_ack);
        while (!rc && s.sent < s.n) {
                rc = post_stream(e, &s, 1);
                while (!rc && e->acked < e->posted)
                        rc = wait_cq(e, &vain);
                if (dst)
                        memcpy(dst, e->rx, o->up);
                if (round_trips) {
                        t1 = clock_stamp();
                        hist_add(round_trips, clock_stamp_ns(t0, t1));
                        t0 = t1;
                }
        }
        while (!rc && e->acked < e->posted)
                rc = wait_cq(e, &vain);
        return rc;
}

/* ---- streams: what serves ---- */

static int serve_send_stream(struct verbs_end *e, const struct raw_order *o)
{
        uint64_t window = send_window(o, e->rq_room), step = window > 1 ? window / 2 : 1, confirmed = 0;
        unsigned vain = 0;
        int rc = post_receives_to(e, o->n < window ? o->n : window, o->up, window);

        rc = rc ? rc : line_up(e);
        while (!rc && confirmed < o->n) {
                if (e->received - confirmed < step && e->received < o->n) {
                        rc = wait_cq(e, &vain);
                        continue;
                }
                confirmed = e->received;
                rc = post_receives_to(e, o->n - confirmed < window ? o->n : confirmed + window, o->up, window);
                rc = rc ? rc : tell(e, CTL_CREDIT, confirmed);
        }
        return rc;
}

static int serve_write_stream(struct verbs_end *e, const struct raw_order *o)
{
        int rc = post_receives(e, 1, 0, 1);

        rc = rc ? rc : line_up(e);
        rc = rc ? rc : await_message(e, 1);
        return rc ? rc : tell(e, CTL_CREDIT, o->n);
}

/* ---- both ---- */

static int verbs_serve(struct raw_end *base, const struct raw_order *o)
{
        struct verbs_end *e = end_of(base);
        int rc;

        order_begin(e);
        if (base->o.kind == RAW_READ)
                rc = line_up(e);
        else if (o->shape == RAW_STREAM)
                rc = base->o.kind == RAW_SEND ? serve_send_stream(e, o) : serve_write_stream(e, o);
        else if (base->o.kind == RAW_SEND)
                rc = send_exchange(e, o->n, o->down, o->up, false, NULL, NULL);
        else
                rc = write_exchange(e, o->n, o->down, o->up, false, NULL, NULL);
        rc = rc ? rc : await_word(e, &e->ctl->done.v, e->orders);
        return rc ? rc : drain(e);
}

static int verbs_drive(struct raw_end *base, const struct raw_order *o, const void *src, void *dst,
                       struct hist *round_trips)
{
        struct verbs_end *e = end_of(base);
        int rc;

        order_begin(e);
        if (base->o.kind != RAW_READ && o->up)
                memcpy(e->tx, src, o->up);
        if (base->o.kind == RAW_READ)
                rc = drive_reads(e, o, dst, round_trips);
        else if (o->shape == RAW_STREAM)
                rc = base->o.kind == RAW_SEND ? drive_send_stream(e, o) : drive_write_stream(e, o);
        else if (base->o.kind == RAW_SEND)
                rc = send_exchange(e, o->n, o->up, o->down, true, dst, round_trips);
        else
                rc = write_exchange(e, o->n, o->up, o->down, true, dst, round_trips);
        return rc ? rc : tell(e, CTL_DONE, e->orders);
}

static const char *verbs_unavailable(void)
{
        return rdma_unavailable();
}

const struct raw_medium raw_verbs_medium = {
    .scheme = "rdma",
    .unavailable = verbs_unavailable,
    .offer = verbs_offer,
    .answer = verbs_answer,
    .settle = verbs_settle,
    .serve = verbs_serve,
    .drive = verbs_drive,
    .free = verbs_free,
};
