/*
 * rdma, hot path.
 *
 * Messages are SENDs into receive buffers that the peer has posted. Each message uses one of them; the sender counts
 * those left (credits), so that it never meets a receiver that is not ready. Buffers go back in chains, and the other
 * side learns of it from the immediate data of our next message; only while we have nothing to say a message of its own
 * carries credits. Such a message needs a buffer too, but no credit: each stands for at least owed_tell buffers of which
 * the peer does not know yet, so no more than window / owed_tell can be on their way, and the receive queue has that
 * many more than the window.
 *
 * Completions are asked for where somebody waits (the buffer is the caller's) and otherwise once in a quarter of the
 * queue, because one completion says that all before it are done.
 *
 * Order. One reliable queue pair executes in order, reads excepted: what is posted after a read carries a fence while
 * one is outstanding. With several queue pairs bulk that is large is cut into pieces which are spread over all of them,
 * and nothing orders one queue pair against another; therefore, while such pieces are on their way, a message, a
 * write_imm's notice, a small write and a read are refused with -EAGAIN (the notice of a write_imm that is spread is held
 * back) until all of them are acknowledged, at which time their bytes lie in the peer's memory. A spread write that
 * overlaps one under way is refused likewise, and spreading begins only when no bulk is outstanding on the first. A
 * write may overtake a message posted before it; the receiver cannot tell that from having polled late.
 */
#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "clock.h"
#include "err.h"
#include "inside.h"
#include "rdma_private.h"

#define LOOK_POLLS     2048u /* polls between two looks at the descriptors */
#define HELD_MOST      16u
#define RING_PIECE(ep) ((ep)->ring_size / 4)

struct wr {
        enum ibv_wr_opcode op;
        const void *addr;
        uint32_t len, lkey, rkey, imm;
        uint64_t raddr;
        bool inlined, signal, more;
};

/* ---- attention ---- */

void rdma_todo(struct rdma_ep *ep)
{
        struct rdma_ctx *c = rdma_ctx_of(ep->base.ctx);

        if (ep->in_todo)
                return;
        ep->in_todo = true;
        ep->next_todo = NULL;
        *c->todo_end = ep;
        c->todo_end = &ep->next_todo;
}

static void todo_remove(struct rdma_ctx *c, struct rdma_ep *ep)
{
        struct rdma_ep **at = &c->todo;

        if (!ep->in_todo)
                return;
        while (*at != ep)
                at = &(*at)->next_todo;
        *at = ep->next_todo;
        if (!*at)
                c->todo_end = at;
        ep->in_todo = false;
}

static void held_remove(struct rdma_ctx *c, struct rdma_ep *ep)
{
        struct rdma_ep **at = &c->held;

        if (!ep->in_held)
                return;
        while (*at != ep)
                at = &(*at)->next_held;
        *at = ep->next_held;
        ep->in_held = false;
}

void rdma_forget(struct rdma_ep *ep)
{
        struct rdma_ctx *c = rdma_ctx_of(ep->base.ctx);

        todo_remove(c, ep);
        held_remove(c, ep);
        for (uint32_t i = c->wc_at; i < c->wc_n; i++)
                if (rdma_id_ep(c, c->wc[i].wr_id) == ep)
                        c->wc[i].wr_id = RDMA_ID_NONE;
}

static int again(struct rdma_ep *ep)
{
        ep->base.n.eagain++;
        return -EAGAIN;
}

static __attribute__((cold)) int lost(const struct rdma_ep *ep)
{
        return err_set(-ENOTCONN, "%s: the connection is down%s%s", ep->base.peer, ep->why[0] ? ": " : "", ep->why);
}

/* ---- the end of a connection ---- */

static void sq_let_go(struct rdma_ep *ep, struct rdma_sq *s);

void rdma_fail(struct rdma_ep *ep, int status, const char *fmt, ...)
{
        struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
        va_list ap;

        if (ep->state >= RDMA_EP_FALLING)
                return;
        va_start(ap, fmt);
        vsnprintf(ep->why, sizeof(ep->why), fmt, ap);
        va_end(ap);
        ep->status = status;
        if (ep->state == RDMA_EP_HALF) {
                ep->state = RDMA_EP_DOWN;
                return;
        }
        ep->state = RDMA_EP_FALLING;
        for (unsigned i = 0; i < ep->n_qps; i++) {
                sq_let_go(ep, &ep->sq[i]);
                ibv_modify_qp(ep->sq[i].qp, &attr, IBV_QP_STATE);
        }
        if (ep->cm)
                rdma_cm_hang_up(ep);
        else if (status != 0)
                boot_send(ep->fd, BOOT_PROTOCOL('r', 'd', 'm', 'a'), BOOT_FAIL, status, 0, NULL, 0);
        ep->fall_deadline_ns = clock_ns() + RDMA_DRAIN_NS;
        ep->fall_empties = rdma_ctx_of(ep->base.ctx)->empties;
        rdma_todo(ep);
}

const char *rdma_wc_hint(enum ibv_wc_status status)
{
        switch (status) {
        case IBV_WC_RETRY_EXC_ERR:
                return "the peer does not answer: its process or host has gone, or path, GID or MTU do not fit";
        case IBV_WC_RNR_RETRY_EXC_ERR:
                return "the peer had no receive buffer, which credits should prevent";
        case IBV_WC_REM_ACCESS_ERR:
                return "the key has expired or the access leads out of what it opens";
        case IBV_WC_REM_INV_REQ_ERR:
                return "the peer's device takes no such request: a message longer than its buffer, or access that the "
                       "queue pair does not allow";
        case IBV_WC_REM_OP_ERR:
                return "the peer's device could not carry it out";
        case IBV_WC_LOC_PROT_ERR:
                return "our own memory is not registered for this, or no longer";
        case IBV_WC_LOC_LEN_ERR:
                return "longer than the device or the posted buffer allows";
        case IBV_WC_LOC_QP_OP_ERR:
                return "the work request was inconsistent, which is a mistake of this program";
        case IBV_WC_WR_FLUSH_ERR:
                return "the queue pair had failed before";
        default:
                return "a failure of the device or the fabric";
        }
}

static int wc_errno(enum ibv_wc_status status)
{
        switch (status) {
        case IBV_WC_REM_ACCESS_ERR:
                return -EACCES;
        case IBV_WC_RETRY_EXC_ERR:
        case IBV_WC_RNR_RETRY_EXC_ERR:
                return -ETIMEDOUT;
        case IBV_WC_LOC_PROT_ERR:
                return -EFAULT;
        case IBV_WC_WR_FLUSH_ERR:
                return -ECONNRESET;
        default:
                return -EIO;
        }
}

/* ---- posting ---- */

static inline struct rdma_rec *sq_rec(const struct rdma_sq *s, uint32_t seq)
{
        return &s->rec[seq & (s->depth - 1)];
}

/* Room for a user's post; markers and credits may use the reserve. */
static inline bool sq_room(const struct rdma_sq *s, uint32_t reserve)
{
        return s->head - s->told + reserve < s->depth;
}

static __attribute__((cold)) void post_failed(struct rdma_ep *ep, const struct rdma_sq *s, int error)
{
        rdma_fail(ep, -EIO, "%s: queue pair %u took no work request: %s", ep->base.peer, s->qpn, strerror(error));
}

static void sq_let_go(struct rdma_ep *ep, struct rdma_sq *s)
{
        int error;

        if (!s->open)
                return;
        s->open = 0;
        error = ibv_wr_complete(s->ex);
        if (error)
                post_failed(ep, s, error);
}

static unsigned send_flags(const struct rdma_ep *ep, const struct wr *w)
{
        return (w->signal ? IBV_SEND_SIGNALED : 0u) | (w->inlined ? IBV_SEND_INLINE : 0u) |
               (ep->reads && w->op != IBV_WR_RDMA_READ ? IBV_SEND_FENCE : 0u);
}

static void build_ex(struct ibv_qp_ex *x, const struct wr *w)
{
        switch (w->op) {
        case IBV_WR_SEND_WITH_IMM:
                ibv_wr_send_imm(x, htonl(w->imm));
                break;
        case IBV_WR_RDMA_WRITE:
                ibv_wr_rdma_write(x, w->rkey, w->raddr);
                break;
        case IBV_WR_RDMA_WRITE_WITH_IMM:
                ibv_wr_rdma_write_imm(x, w->rkey, w->raddr, htonl(w->imm));
                break;
        default:
                ibv_wr_rdma_read(x, w->rkey, w->raddr);
        }
        if (w->inlined)
                ibv_wr_set_inline_data(x, (void *)(uintptr_t)w->addr, w->len);
        else if (w->len > 0)
                ibv_wr_set_sge(x, w->lkey, (uintptr_t)w->addr, w->len);
        else
                ibv_wr_set_sge_list(x, 0, NULL);
}

static void hold(struct rdma_ep *ep)
{
        struct rdma_ctx *c = rdma_ctx_of(ep->base.ctx);

        if (ep->in_held)
                return;
        ep->in_held = true;
        ep->next_held = c->held;
        c->held = ep;
}

static void post_ex(struct rdma_ep *ep, struct rdma_sq *s, const struct wr *w, uint64_t id)
{
        struct ibv_qp_ex *x = s->ex;

        if (!s->open)
                ibv_wr_start(x);
        x->wr_id = id;
        x->wr_flags = send_flags(ep, w);
        build_ex(x, w);
        s->open++;
        if (!w->more || s->open >= HELD_MOST)
                sq_let_go(ep, s);
        else
                hold(ep);
}

static void post_plain(struct rdma_ep *ep, struct rdma_sq *s, const struct wr *w, uint64_t id)
{
        struct ibv_sge sge = {.addr = (uintptr_t)w->addr, .length = w->len, .lkey = w->lkey};
        struct ibv_send_wr wr =
                               {
                                   .wr_id = id,
                                   .sg_list = &sge,
                                   .num_sge = w->len > 0,
                                   .opcode = w->op,
                                   .send_flags = send_flags(ep, w),
                                   .imm_data = htonl(w->imm),
                               },
                           *bad;
        int error;

        wr.wr.rdma.remote_addr = w->raddr;
        wr.wr.rdma.rkey = w->rkey;
        error = ibv_post_send(s->qp, &wr, &bad);
        if (error)
                post_failed(ep, s, error);
}

/* Posts w, whose record the caller has filled in at the head. There is room. */
static void sq_post(struct rdma_ep *ep, struct rdma_sq *s, struct wr *w)
{
        uint64_t id = rdma_id(ep) | (uint64_t)s->index << 27 | (s->head & RDMA_ID_SEQ_MASK);
        const struct rdma_rec *r = sq_rec(s, s->head);

        if (w->more && r->kind != RDMA_REC_NONE && !w->signal)
                s->uncovered = true;
        else if (r->kind != RDMA_REC_NONE || (s->uncovered && !w->more))
                w->signal = true;
        w->signal = w->signal || s->quiet + 1 >= s->depth / 4 || ep->ring_quiet >= RING_PIECE(ep);
        s->quiet++;
        if (w->signal) {
                s->quiet = 0;
                s->uncovered = false;
                if (s->index == 0)
                        ep->ring_quiet = 0;
        }
        s->head++;
        if (s->ex)
                post_ex(ep, s, w, id);
        else
                post_plain(ep, s, w, id);
}

/* A write of nothing, whose completion says that all before it is done. */
static void post_marker(struct rdma_ep *ep, struct rdma_sq *s, uint64_t cookie, bool user)
{
        struct wr w = {.op = IBV_WR_RDMA_WRITE, .signal = true};

        *sq_rec(s, s->head) = (struct rdma_rec){
            .kind = user ? RDMA_REC_USER : RDMA_REC_NONE, .cookie = cookie, .what = "a marker (RDMA_WRITE of nothing)"};
        sq_post(ep, s, &w);
}

static void let_go(struct rdma_ep *ep)
{
        for (unsigned i = 0; i < ep->n_qps; i++) {
                struct rdma_sq *s = &ep->sq[i];

                sq_let_go(ep, s);
                if (s->uncovered && sq_room(s, 1))
                        post_marker(ep, s, 0, false);
        }
}

static void let_all_go(struct rdma_ctx *c)
{
        while (c->held) {
                struct rdma_ep *ep = c->held;

                c->held = ep->next_held;
                ep->in_held = false;
                let_go(ep);
        }
}

/* ---- the ring of copies ---- */

/* len contiguous bytes, or NULL. They are free again when the record that notes ring_end is done. */
static uint8_t *ring_get(struct rdma_ep *ep, uint32_t len, uint32_t *end)
{
        uint32_t need = ALIGN_UP(len, (uint32_t)CACHE_LINE), at = ep->ring_head & (ep->ring_size - 1), skip = 0;

        if (at + need > ep->ring_size)
                skip = ep->ring_size - at;
        if (ep->ring_head - ep->ring_tail + skip + need > ep->ring_size)
                return NULL;
        ep->ring_head += skip + need;
        ep->ring_quiet += skip + need;
        *end = ep->ring_head;
        return ep->ring + (skip ? 0 : at);
}

/* ---- receiving ---- */

static void tell_credits(struct rdma_ep *ep)
{
        struct rdma_sq *s = &ep->sq[0];
        struct wr w = {.op = IBV_WR_SEND_WITH_IMM, .imm = RDMA_IMM_OF(RDMA_CREDIT, ep->owed)};

        ep->credit_due = ep->owed >= ep->owed_tell;
        if (!ep->credit_due || !sq_room(s, 0))
                return;
        ep->owed = 0;
        ep->credit_due = false;
        ep->tx_used++;
        *sq_rec(s, s->head) = (struct rdma_rec){.kind = RDMA_REC_NONE, .what = "credits (SEND)"};
        sq_post(ep, s, &w);
}

static void post_chain(struct rdma_ep *ep)
{
        struct ibv_recv_wr *bad;
        int error;

        if (!ep->chain_n || ep->state >= RDMA_EP_FALLING)
                return;
        ep->chain_last->next = NULL;
        error = ibv_post_recv(ep->sq[0].qp, ep->chain_first, &bad);
        if (error) {
                rdma_fail(ep, -EIO, "%s: queue pair %u took no receive buffer: %s", ep->base.peer, ep->sq[0].qpn,
                          strerror(error));
                return;
        }
        ep->owed += ep->chain_n - ep->chain_unpaid;
        ep->chain_n = ep->chain_unpaid = 0;
        ep->chain_first = NULL;
        /* A message of ours that follows at once carries them; else the next poll tells. */
        if (ep->owed >= ep->owed_tell) {
                ep->credit_due = true;
                rdma_todo(ep);
        }
}

static inline void give_back(struct rdma_ep *ep, uint32_t i)
{
        struct ibv_recv_wr *wr = &ep->rx_wr[i];

        if (ep->chain_n)
                ep->chain_last->next = wr;
        else
                ep->chain_first = wr;
        ep->chain_last = wr;
        if (++ep->chain_n >= ep->chain_most)
                post_chain(ep);
}

int rdma_receive_all(struct rdma_ep *ep)
{
        struct ibv_recv_wr *bad;

        for (uint32_t i = 0; i < ep->rx_depth; i++) {
                ep->rx_sge[i] = (struct ibv_sge){
                    .addr = (uintptr_t)(ep->rx + (size_t)i * ep->rx_slot), .length = ep->rx_slot, .lkey = ep->rx_lkey};
                ep->rx_wr[i] = (struct ibv_recv_wr){.wr_id = rdma_id(ep) | RDMA_ID_RECV | i,
                                                    .sg_list = &ep->rx_sge[i],
                                                    .num_sge = 1,
                                                    .next = i + 1 < ep->rx_depth ? &ep->rx_wr[i + 1] : NULL};
        }
        return -ibv_post_recv(ep->sq[0].qp, ep->rx_wr, &bad);
}

void rdma_release(struct tp_ep *base, uint64_t loan)
{
        struct rdma_ep *ep = rdma_ep_of(base);

        BUG_ON(loan >= ep->rx_depth);
        give_back(ep, (uint32_t)loan);
}

static void imm_event(struct rdma_ep *ep, uint64_t len, uint32_t imm, struct tp_event *ev)
{
        ep->base.n.bulk_bytes_rx += len;
        *ev = (struct tp_event){.kind = TP_EV_IMM, .ep = &ep->base, .len = len, .imm = imm};
}

static __attribute__((cold)) int bad_message(struct rdma_ep *ep, const struct ibv_wc *wc)
{
        rdma_fail(ep, -EPROTO, "%s: sent %u bytes with immediate data 0x%x, which no version sends", ep->base.peer,
                  wc->byte_len, ntohl(wc->imm_data));
        return 0;
}

static int control_message(struct rdma_ep *ep, const struct ibv_wc *wc, uint32_t i, struct tp_event *ev)
{
        uint32_t kind = ntohl(wc->imm_data) >> 16;
        struct rdma_notice n;

        if (kind == RDMA_CREDIT && wc->byte_len == 0) {
                ep->chain_unpaid++; /* it took no credit, so it gives none back */
                give_back(ep, i);
                post_chain(ep); /* the reserve for credits is small */
                return 0;
        }
        if (kind == RDMA_BYE && wc->byte_len == 0) { /* its buffer is not needed any more */
                ep->cm_bye = true;
                return 0;
        }
        if (kind >= RDMA_PLACE && kind <= RDMA_FRESH && wc->byte_len == sizeof(struct rdma_stage_msg)) {
                int got = rdma_stage_arrived(ep, kind, ep->rx + (size_t)i * ep->rx_slot, ev);

                give_back(ep, i);
                return got;
        }
        if (kind != RDMA_IMM || wc->byte_len != sizeof(n))
                return bad_message(ep, wc);
        memcpy(&n, ep->rx + (size_t)i * ep->rx_slot, sizeof(n));
        give_back(ep, i);
        imm_event(ep, le64toh(n.len), le32toh(n.imm), ev);
        return 1;
}

static int received(struct rdma_ep *ep, const struct ibv_wc *wc, struct tp_event *ev)
{
        uint32_t i = (uint32_t)wc->wr_id & RDMA_ID_SEQ_MASK, imm;

        if (ep->state == RDMA_EP_DOWN)
                return 0;
        ep->rx_seen++;
        if (wc->opcode == IBV_WC_RECV_RDMA_WITH_IMM) {
                give_back(ep, i);
                imm_event(ep, wc->byte_len, ntohl(wc->imm_data), ev);
                return 1;
        }
        imm = ntohl(wc->imm_data);
        ep->credits += imm & 0xffff;
        if (!(wc->wc_flags & IBV_WC_WITH_IMM) || ep->credits > ep->peer_window)
                return bad_message(ep, wc);
        if (imm >> 16 != RDMA_MSG)
                return control_message(ep, wc, i, ev);
        ep->base.n.msgs_rx++;
        ep->base.n.msg_bytes_rx += wc->byte_len;
        *ev = (struct tp_event){.kind = TP_EV_MSG,
                                .ep = &ep->base,
                                .data = ep->rx + (size_t)i * ep->rx_slot,
                                .len = wc->byte_len,
                                .cookie = i};
        return 1;
}

/* ---- completions ---- */

static void done_event(struct rdma_ep *ep, uint64_t cookie, int status, struct tp_event *ev)
{
        *ev = (struct tp_event){.kind = TP_EV_DONE, .ep = &ep->base, .cookie = cookie, .status = status};
}

/* What a post that did not make it ends with: an orderly end of the connection is an error to it all the same. */
static int post_status(const struct rdma_ep *ep)
{
        return ep->status ? ep->status : -ECONNRESET;
}

static int op_piece_done(struct rdma_ep *ep, struct rdma_op *op, int status, struct tp_event *ev)
{
        op->left--;
        if (status)
                op->status = status;
        if (!op->posted || op->left > 0)
                return 0;
        op->used = false;
        ep->spread--;
        if (op->silent)
                return 0;
        done_event(ep, op->cookie, op->status, ev);
        return 1;
}

/* Tells of posts that are done, up to room events; what is left waits for the next poll. */
static int retire(struct rdma_ep *ep, struct rdma_sq *s, struct tp_event *ev, int room)
{
        int n = 0;

        while (s->told != s->acked) {
                const struct rdma_rec *r = sq_rec(s, s->told);
                int status = s->broken && (int32_t)(s->told - s->failed) >= 0 ? post_status(ep) : r->status;

                if (r->kind != RDMA_REC_NONE && n == room) {
                        rdma_todo(ep);
                        return n;
                }
                s->told++;
                if (r->ring)
                        ep->ring_tail = r->ring_end;
                if (r->read)
                        ep->reads--;
                if (r->plain)
                        ep->plain--;
                if (r->put && !status)
                        rdma_stage_landed(ep, r);
                else if (r->dst && !status)
                        memcpy(r->dst, r->bounce, r->len);
                if (r->kind == RDMA_REC_USER)
                        done_event(ep, r->cookie, status, &ev[n++]);
                else if (r->kind == RDMA_REC_CHUNK)
                        n += op_piece_done(ep, &ep->ops[r->op], status, &ev[n]);
        }
        if (ep->cur.active)
                rdma_todo(ep);
        return n;
}

static void sq_acked(struct rdma_sq *s, uint64_t id, bool itself)
{
        uint32_t seq = (uint32_t)id & RDMA_ID_SEQ_MASK;

        s->acked += ((seq - s->acked) & RDMA_ID_SEQ_MASK) + itself;
}

static struct rdma_sq *sq_of(struct rdma_ep *ep, uint64_t id)
{
        return &ep->sq[(id >> 27) & 15];
}

static __attribute__((cold)) void completed_badly(struct rdma_ctx *c, struct rdma_ep *ep, const struct ibv_wc *wc)
{
        bool recv = wc->wr_id & RDMA_ID_RECV;
        struct rdma_sq *s = recv ? &ep->sq[0] : sq_of(ep, wc->wr_id);

        if (!recv) {
                sq_acked(s, wc->wr_id, false);
                if (!s->broken) {
                        s->broken = true;
                        s->failed = s->acked;
                }
                s->acked++;
        }
        /* Flushed before anybody told us why: the device did that, and its event says why. */
        if (wc->status == IBV_WC_WR_FLUSH_ERR && ep->state <= RDMA_EP_LIVE)
                rdma_control(c);
        rdma_fail(ep, wc_errno(wc->status), "%s: queue pair %u: %s ended in %s (vendor code 0x%x): %s", ep->base.peer,
                  s->qpn, recv ? "a receive" : sq_rec(s, s->failed)->what, ibv_wc_status_str(wc->status),
                  wc->vendor_err, rdma_wc_hint(wc->status));
        rdma_todo(ep);
}

/* No buffer is posted again before it was looked at, so there are never more than rx_depth. */
static void keep_early(struct rdma_ep *ep, const struct ibv_wc *wc)
{
        if (ep->n_early == ep->rx_depth) {
                ep->n_early -= ep->early_at;
                memmove(ep->early, ep->early + ep->early_at, ep->n_early * sizeof(*ep->early));
                ep->early_at = 0;
        }
        ep->early[ep->n_early++] = *wc;
}

static inline int completed(struct rdma_ctx *c, const struct ibv_wc *wc, struct tp_event *ev, int room)
{
        struct rdma_ep *ep = rdma_id_ep(c, wc->wr_id);
        struct rdma_sq *s;

        if (__builtin_expect(!ep, 0))
                return 0;
        if (__builtin_expect(wc->status != IBV_WC_SUCCESS, 0)) {
                completed_badly(c, ep, wc);
                return 0;
        }
        if (wc->wr_id & RDMA_ID_RECV) {
                if (__builtin_expect(ep->early != NULL, 0)) {
                        keep_early(ep, wc);
                        return 0;
                }
                return received(ep, wc, ev);
        }
        s = sq_of(ep, wc->wr_id);
        sq_acked(s, wc->wr_id, true);
        return retire(ep, s, ev, room);
}

/* ---- what the next poll looks after ---- */

static bool pump(struct rdma_ep *ep);

static int deliver_early(struct rdma_ep *ep, struct tp_event *ev, int room)
{
        int n = 0;

        while (ep->early_at < ep->n_early && n < room)
                n += received(ep, &ep->early[ep->early_at++], &ev[n]);
        if (ep->early_at == ep->n_early) {
                free(ep->early);
                ep->early = NULL;
        }
        return n;
}

static bool sqs_drained(const struct rdma_ep *ep)
{
        for (unsigned i = 0; i < ep->n_qps; i++)
                if (ep->sq[i].acked != ep->sq[i].head)
                        return false;
        return true;
}

static bool sqs_told(const struct rdma_ep *ep)
{
        for (unsigned i = 0; i < ep->n_qps; i++)
                if (ep->sq[i].told != ep->sq[i].acked)
                        return false;
        return true;
}

/* The device has given up or forgotten what is still outstanding. */
static void sqs_give_up(struct rdma_ep *ep)
{
        for (unsigned i = 0; i < ep->n_qps; i++) {
                struct rdma_sq *s = &ep->sq[i];

                if (s->acked == s->head)
                        continue;
                if (!s->broken) {
                        s->broken = true;
                        s->failed = s->acked;
                }
                s->acked = s->head;
        }
}

static int fall_posts(struct rdma_ep *ep, struct tp_event *ev, int room)
{
        int n = 0;

        for (unsigned i = 0; i < RDMA_OPS && ep->ops && n < room; i++) {
                if (!ep->ops[i].used)
                        continue;
                ep->ops[i].used = false;
                if (!ep->ops[i].silent && !(ep->cur.active && ep->cur.op == (int)i))
                        done_event(ep, ep->ops[i].cookie, post_status(ep), &ev[n++]);
        }
        if (ep->cur.active && n < room) {
                ep->cur.active = false;
                done_event(ep, ep->cur.cookie, post_status(ep), &ev[n++]);
        }
        return n;
}

/*
 * Messages that came before the end are delivered first: they are in the completion queue, so it must have been seen
 * empty since the queue pair failed. And memory is the caller's again only when the device lets go of it, which the
 * flushed work requests say; a device that does not say so is not waited for long.
 */
static int fall(struct rdma_ctx *c, struct rdma_ep *ep, struct tp_event *ev, int room)
{
        int n = 0;

        if (ep->early)
                return 0;
        if ((!sqs_drained(ep) || c->empties <= ep->fall_empties) && clock_ns() < ep->fall_deadline_ns)
                return 0;
        sqs_give_up(ep);
        for (unsigned i = 0; i < ep->n_qps; i++)
                n += retire(ep, &ep->sq[i], ev + n, room - n);
        if (!sqs_told(ep))
                return n;
        n += fall_posts(ep, ev + n, room - n);
        if (n == room)
                return n;
        ep->state = RDMA_EP_DOWN;
        if (ep->cm_gone && !ep->cm_bye) {
                ep->status = -ECONNRESET;
                snprintf(ep->why, sizeof(ep->why), "%s: the peer has gone without closing the connection",
                         ep->base.peer);
        }
        err_set(ep->status ? ep->status : -ECONNRESET, "%s", ep->why);
        ev[n++] = (struct tp_event){.kind = TP_EV_DOWN, .ep = &ep->base, .status = ep->status};
        return n;
}

static bool has_work(const struct rdma_ep *ep)
{
        return ep->state == RDMA_EP_FALLING || (ep->early && ep->state == RDMA_EP_LIVE) || ep->bye || ep->credit_due ||
               ep->fresh_due || !sqs_told(ep);
}

static int work_on(struct rdma_ctx *c, struct rdma_ep *ep, struct tp_event *ev, int room)
{
        int n = 0;

        if (ep->state == RDMA_EP_HALF || ep->state == RDMA_EP_DOWN)
                return 0;
        if (ep->early)
                n += deliver_early(ep, ev, room);
        for (unsigned i = 0; i < ep->n_qps && n < room; i++)
                n += retire(ep, &ep->sq[i], ev + n, room - n);
        if (ep->state == RDMA_EP_LIVE) {
                if (ep->cur.active)
                        pump(ep);
                if (ep->credit_due)
                        tell_credits(ep);
                if (ep->fresh_due)
                        rdma_stage_answer(ep);
                if (ep->bye && !ep->early && (ep->rx_seen >= ep->bye_count || clock_ns() >= ep->fall_deadline_ns)) {
                        ep->bye = false;
                        rdma_fail(ep, 0, "%s: closed the connection", ep->base.peer);
                }
        } else if (n < room) {
                ep->bye = false;
                n += fall(c, ep, ev + n, room - n);
        }
        if (ep->state != RDMA_EP_DOWN && has_work(ep))
                rdma_todo(ep);
        return n;
}

/* Once around those who were in the list when it began. */
static int work(struct rdma_ctx *c, struct tp_event *ev, int max)
{
        struct rdma_ep *ep, **last = c->todo_end;
        int n = 0;

        while ((ep = c->todo) && n < max) {
                bool end = last == &ep->next_todo;

                c->todo = ep->next_todo;
                if (!c->todo)
                        c->todo_end = &c->todo;
                ep->in_todo = false;
                n += work_on(c, ep, ev + n, max - n);
                if (end)
                        break;
        }
        return n;
}

/* ---- polling ---- */

/* Takes completions from the device, behind those not looked at yet. */
static void take(struct rdma_ctx *c)
{
        uint32_t before;

        if (c->wc_at == c->wc_n)
                c->wc_at = c->wc_n = 0;
        if (c->wc_n + RDMA_POLL_BATCH > c->wc_cap) {
                if (c->wc_at < RDMA_POLL_BATCH)
                        return;
                memmove(c->wc, c->wc + c->wc_at, (c->wc_n - c->wc_at) * sizeof(*c->wc));
                c->wc_n -= c->wc_at;
                c->wc_at = 0;
        }
        before = c->wc_n;
        for (unsigned i = 0; i < c->n_cq && c->wc_n + RDMA_POLL_BATCH <= c->wc_cap; i++) {
                int n = ibv_poll_cq(c->cq[i].cq, RDMA_POLL_BATCH, c->wc + c->wc_n);

                if (n > 0)
                        c->wc_n += (uint32_t)n;
        }
        if (c->wc_n == before && c->wc_at == c->wc_n)
                c->empties++;
}

static inline void refill(struct rdma_ctx *c)
{
        int n;

        if (__builtin_expect(c->n_cq != 1, 0)) {
                take(c);
                return;
        }
        c->wc_at = c->wc_n = 0;
        n = ibv_poll_cq(c->cq->cq, RDMA_POLL_BATCH, c->wc);
        if (n > 0)
                c->wc_n = (uint32_t)n;
        else
                c->empties++;
}

static __attribute__((noinline)) int chores(struct rdma_ctx *c, struct tp_event *ev, int max)
{
        if (c->held)
                let_all_go(c);
        return c->todo ? work(c, ev, max) : 0;
}

/* A poll that finds nothing is what the time until a message is noticed consists of: it is kept short. */
int rdma_poll(struct tp_ctx *base, struct tp_event *ev, int max)
{
        struct rdma_ctx *c = rdma_ctx_of(base);
        int n = 0;

        if (__builtin_expect(c->held || c->todo, 0))
                n = chores(c, ev, max);
        if (c->wc_at == c->wc_n)
                refill(c);
        while (c->wc_at < c->wc_n && n < max)
                n += completed(c, &c->wc[c->wc_at++], ev + n, max - n);
        if (__builtin_expect(++c->tick >= LOOK_POLLS, 0)) {
                c->tick = 0;
                rdma_control(c);
        }
        return n;
}

int rdma_fd(struct tp_ctx *base)
{
        return rdma_ctx_of(base)->epfd;
}

int rdma_arm(struct tp_ctx *base)
{
        struct rdma_ctx *c = rdma_ctx_of(base);

        let_all_go(c);
        if (c->todo || c->wc_at < c->wc_n)
                return -EAGAIN;
        for (unsigned i = 0; i < c->n_cq; i++)
                if (ibv_req_notify_cq(c->cq[i].cq, 0) != 0)
                        return -EAGAIN;
        take(c); /* what came before the queue was asked to notify us does not notify us */
        if (c->wc_at < c->wc_n)
                return -EAGAIN;
        for (struct rdma_ep *ep = c->eps; ep; ep = ep->next)
                ep->base.n.naps++;
        c->armed = true;
        return 0;
}

void rdma_disarm(struct tp_ctx *base)
{
        struct rdma_ctx *c = rdma_ctx_of(base);

        if (c->armed)
                c->tick = LOOK_POLLS; /* a descriptor may be what woke us */
        c->armed = false;
}

/* ---- messages ---- */

int rdma_send(struct tp_ep *base, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        struct rdma_ep *ep = rdma_ep_of(base);
        struct rdma_sq *s = &ep->sq[0];
        struct wr w = {.op = IBV_WR_SEND_WITH_IMM, .addr = buf, .len = (uint32_t)len, .more = flags & TP_MORE};
        struct rdma_rec *r = sq_rec(s, s->head);
        uint32_t end = 0;

        if (ep->state != RDMA_EP_LIVE)
                return lost(ep);
        if (len > ep->peer_msg_max)
                return err_set(-EMSGSIZE, "%s: a message of %zu bytes, the peer takes %zu", base->peer, len,
                               ep->peer_msg_max);
        if (ep->credits == 0 || ep->cur.active || ep->spread || !sq_room(s, RDMA_SQ_RESERVE))
                return again(ep);
        w.inlined = len <= ep->inline_max;
        if (!w.inlined) {
                uint8_t *copy = ring_get(ep, w.len, &end);

                if (!copy)
                        return again(ep);
                memcpy(copy, buf, len);
                base->n.bytes_copied += len;
                w.addr = copy;
                w.lkey = ep->tx_lkey;
        }
        *r = (struct rdma_rec){.kind = RDMA_REC_NONE, .ring = !w.inlined, .ring_end = end, .what = "a message (SEND)"};
        w.imm = RDMA_IMM_OF(RDMA_MSG, ep->owed);
        ep->owed = 0;
        ep->credits--;
        ep->tx_used++;
        sq_post(ep, s, &w);
        base->n.msgs_tx++;
        base->n.msg_bytes_tx += len;
        return TP_COMPLETE;
}

/* ---- bulk ---- */

static const enum ibv_wr_opcode bulk_opcode[] = {IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_READ};
static const char *const bulk_what[] = {"a write (RDMA_WRITE)", "a write (RDMA_WRITE_WITH_IMM)", "a read (RDMA_READ)"};

static struct rdma_sq *sq_next(struct rdma_ep *ep)
{
        for (unsigned i = 0; i < ep->n_qps; i++) {
                struct rdma_sq *s = &ep->sq[ep->next_sq];

                ep->next_sq = (ep->next_sq + 1) % ep->n_qps;
                if (sq_room(s, RDMA_SQ_RESERVE))
                        return s;
        }
        return NULL;
}

/* One piece of a bulk post that is spread over the queue pairs. */
static bool spread_piece(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;
        struct rdma_op *op = &ep->ops[u->op];
        struct rdma_sq *s = sq_next(ep);
        struct wr w = {.op = u->kind == RDMA_BULK_READ ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE, .signal = true};

        if (!s)
                return false;
        w.addr = u->at;
        w.len = (uint32_t)(u->left < u->piece ? u->left : u->piece);
        w.lkey = u->lkey;
        w.rkey = u->rkey;
        w.raddr = u->raddr;
        *sq_rec(s, s->head) = (struct rdma_rec){.kind = RDMA_REC_CHUNK,
                                                .op = (uint16_t)u->op,
                                                .read = u->kind == RDMA_BULK_READ,
                                                .what = bulk_what[u->kind]};
        ep->reads += u->kind == RDMA_BULK_READ;
        op->left++;
        u->at += w.len;
        u->raddr += w.len;
        u->left -= w.len;
        op->posted = u->left == 0;
        sq_post(ep, s, &w);
        return true;
}

/* One piece on the first queue pair. */
static bool plain_piece(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;
        struct rdma_sq *s = &ep->sq[0];
        bool read = u->kind == RDMA_BULK_READ;
        struct wr w = {.addr = u->at, .lkey = u->lkey, .rkey = u->rkey, .raddr = u->raddr, .inlined = u->inlined};
        struct rdma_rec r = {.what = bulk_what[u->kind], .cookie = u->cookie, .read = read, .plain = ep->n_qps > 1};
        bool last;

        if (!sq_room(s, RDMA_SQ_RESERVE))
                return false;
        w.len = (uint32_t)(u->left < u->piece ? u->left : u->piece);
        last = w.len == u->left;
        if (u->bounce) {
                uint8_t *copy = ring_get(ep, w.len, &r.ring_end);

                if (!copy)
                        return false;
                r.ring = true;
                w.addr = copy;
                if (read) {
                        r.dst = u->at;
                        r.bounce = copy;
                        r.len = w.len;
                } else {
                        memcpy(copy, u->at, w.len);
                }
        } else if (u->mem && read) {
                r.put = true;
                r.dst = u->at;
                r.bounce = (uint8_t *)(uintptr_t)u->mem;
                r.len = w.len;
        }
        w.op = bulk_opcode[u->kind];
        w.imm = u->imm;
        if (u->notice)
                w.op = IBV_WR_RDMA_WRITE;
        else if (last && u->wanted)
                r.kind = RDMA_REC_USER;
        w.more = last ? u->more : true;
        w.signal = read || ep->n_qps > 1;
        *sq_rec(s, s->head) = r;
        ep->reads += read;
        ep->plain += r.plain;
        u->at += w.len;
        u->raddr += w.len;
        u->left -= w.len;
        sq_post(ep, s, &w);
        return true;
}

bool rdma_post_control(struct rdma_ep *ep, enum rdma_kind kind, const void *payload, uint32_t len, struct rdma_rec r,
                       bool more)
{
        struct rdma_sq *s = &ep->sq[0];
        struct wr w = {.op = IBV_WR_SEND_WITH_IMM, .addr = payload, .len = len, .more = more};

        if (ep->spread || !sq_room(s, RDMA_SQ_RESERVE))
                return false;
        w.inlined = len <= ep->inline_max;
        if (!w.inlined) {
                uint8_t *copy = ring_get(ep, len, &r.ring_end);

                if (!copy)
                        return false;
                memcpy(copy, payload, len);
                r.ring = true;
                w.addr = copy;
                w.lkey = ep->tx_lkey;
        }
        w.imm = RDMA_IMM_OF(kind, ep->owed);
        ep->owed = 0;
        *sq_rec(s, s->head) = r;
        sq_post(ep, s, &w);
        return true;
}

/* The end of a write_imm in several pieces, or of a write into staged memory. */
static bool post_notice(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;
        struct rdma_notice n = {.len = htole64(u->len), .imm = htole32(u->imm)};
        struct rdma_rec r = {.cookie = u->cookie, .what = "the end of a write (SEND)"};

        r.kind = u->wanted ? RDMA_REC_USER : RDMA_REC_NONE;
        if (u->place)
                return rdma_stage_place(ep, r);
        return rdma_post_control(ep, RDMA_IMM, &n, sizeof(n), r, u->more);
}

/* Posts as much as there is room for; true when all of it is posted. */
static bool pump(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;

        if (u->cancelled) {
                if (!sq_room(&ep->sq[0], 1))
                        return false;
                post_marker(ep, &ep->sq[0], u->cookie, true);
                sq_rec(&ep->sq[0], ep->sq[0].head - 1)->status = -ECANCELED;
                if (u->kind == RDMA_BULK_WRITE_IMM || (u->place && u->kind == RDMA_BULK_WRITE)) {
                        ep->credits++; /* what it was for was not sent */
                        ep->tx_used--;
                }
                u->active = false;
                return true;
        }
        while (!u->begun || u->left > 0) {
                if ((u->mem || u->place) && !rdma_stage_ready(ep))
                        return false;
                if (!(u->op >= 0 ? spread_piece(ep) : plain_piece(ep)))
                        return false;
                u->begun = true;
        }
        if (u->notice && !post_notice(ep))
                return false;
        u->active = false;
        return true;
}

static bool overlaps(const struct rdma_op *op, const struct rdma_cur *u)
{
        return op->used && op->rkey == u->rkey && op->raddr < u->raddr + u->left && u->raddr < op->raddr + op->len;
}

/* May this post begin, with what is outstanding on the queue pairs? See the head of this file. */
static bool order_allows(struct rdma_ep *ep, const struct rdma_cur *u, bool spread)
{
        if (!spread)
                return ep->spread == 0;
        if (ep->plain || ep->spread == RDMA_OPS || (ep->spread && ep->spread_reads != (u->kind == RDMA_BULK_READ)))
                return false;
        for (unsigned i = 0; ep->spread && i < RDMA_OPS; i++)
                if (overlaps(&ep->ops[i], u))
                        return false;
        return true;
}

static void spread_begin(struct rdma_ep *ep, struct rdma_cur *u)
{
        uint64_t piece = ALIGN_UP(u->len / ep->n_qps, (uint64_t)4096);
        int i = 0;

        while (ep->ops[i].used)
                i++;
        u->op = i;
        u->piece = piece < ep->chunk_max ? piece : ep->chunk_max;
        u->notice = u->kind == RDMA_BULK_WRITE_IMM;
        ep->ops[i] = (struct rdma_op){
            .used = true, .silent = u->notice, .cookie = u->cookie, .raddr = u->raddr, .len = u->len, .rkey = u->rkey};
        ep->spread++;
        ep->spread_reads = u->kind == RDMA_BULK_READ;
}

static int bulk_start(struct rdma_ep *ep, bool host, bool spread)
{
        struct rdma_cur *u = &ep->cur;
        uint64_t first_left = u->left;

        u->active = true;
        u->op = -1;
        u->inlined = u->kind != RDMA_BULK_READ && host && u->len <= ep->inline_max;
        u->bounce = u->bounce && !u->inlined;
        u->wanted = !u->inlined && !(u->bounce && u->kind != RDMA_BULK_READ);
        u->piece = u->bounce ? RING_PIECE(ep) : ep->chunk_max;
        if (u->bounce)
                u->lkey = ep->tx_lkey;
        if (u->mem && u->piece > RDMA_STAGE_PIECE)
                u->piece = RDMA_STAGE_PIECE;
        u->notice = (u->place && u->kind != RDMA_BULK_READ) || (u->kind == RDMA_BULK_WRITE_IMM && u->len > u->piece);
        if (spread)
                spread_begin(ep, u);
        if (pump(ep))
                return u->wanted ? TP_POSTED : TP_COMPLETE;
        if (!u->begun && u->left == first_left) {
                u->active = false;
                if (spread) {
                        ep->ops[u->op].used = false;
                        ep->spread--;
                }
                return -EAGAIN;
        }
        u->wanted = true;
        for (unsigned i = 0; i < ep->n_qps; i++)
                sq_let_go(ep, &ep->sq[i]);
        return TP_POSTED;
}

static void bulk_count(struct rdma_ep *ep, const struct rdma_cur *u, bool copied)
{
        ep->base.n.bulk_ops++;
        if (u->kind == RDMA_BULK_READ)
                ep->base.n.bulk_bytes_rx += u->len;
        else
                ep->base.n.bulk_bytes_tx += u->len;
        if (copied)
                ep->base.n.bytes_copied += u->len;
}

/* What work requests call this byte: not its address where device memory was registered through a descriptor. */
static uint8_t *local_addr(const struct rdma_mem *m, const void *p)
{
        uintptr_t at = (uintptr_t)p;

        if (m && !m->host)
                at = m->reg.iova + (at - (uintptr_t)m->base.region.addr);
        return (uint8_t *)at;
}

static int bulk(struct rdma_ep *ep, enum rdma_bulk kind, struct tp_mem *mem, const void *p, size_t len,
                struct tp_rmem *rmem, uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        const struct rdma_mem *m = mem ? container_of(mem, struct rdma_mem, base) : NULL;
        const struct rdma_rmem *r = container_of(rmem, struct rdma_rmem, base);
        const struct rdma_mem *staged = m && m->reg.bounce && len > 0 ? m : NULL;
        bool place = r->staged && len > 0, spread = ep->n_qps > 1 && m && !staged && !place && len >= RDMA_STRIPE_LEAST;
        bool message = kind == RDMA_BULK_WRITE_IMM || place; /* uses a receive buffer of the peer's */
        int rc;

        if (ep->state != RDMA_EP_LIVE)
                return lost(ep);
        if (!tpi_inside(roff, len, rmem->len))
                return err_set(-ERANGE, "%s: %zu bytes at %llu of memory for which the peer's key opens %llu",
                               ep->base.peer, len, (unsigned long long)roff, (unsigned long long)rmem->len);
        if (!tpi_in_mem(mem, p, len))
                return err_set(-ERANGE, "%s: %zu bytes that do not lie in the memory named", ep->base.peer, len);
        if (ep->cur.active || (message && ep->credits == 0))
                return again(ep);
        ep->cur = (struct rdma_cur){.kind = kind,
                                    .at = local_addr(m, p),
                                    .left = len,
                                    .len = len,
                                    .raddr = r->addr + roff,
                                    .rkey = r->rkey,
                                    .lkey = m ? m->reg.mr.lkey : 0,
                                    .imm = imm,
                                    .cookie = cookie,
                                    .bounce = !m,
                                    .mem = staged,
                                    .place = place,
                                    .refresh = place && kind == RDMA_BULK_READ ? RDMA_REFRESH_DUE : RDMA_REFRESH_NONE,
                                    .more = flags & TP_MORE};
        if (ep->n_qps > 1 && !order_allows(ep, &ep->cur, spread))
                return again(ep);
        if (len == 0 && kind == RDMA_BULK_READ) {
                bulk_count(ep, &ep->cur, false);
                return TP_COMPLETE;
        }
        rc = bulk_start(ep, !m || m->host, spread);
        if (rc == -EAGAIN)
                return again(ep);
        if (message) {
                ep->credits--;
                ep->tx_used++;
        }
        bulk_count(ep, &ep->cur, ep->cur.bounce || staged);
        return rc;
}

int rdma_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem, uint64_t roff,
               unsigned flags, uint64_t cookie)
{
        return bulk(rdma_ep_of(ep), RDMA_BULK_WRITE, mem, src, len, rmem, roff, 0, flags, cookie);
}

int rdma_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                   uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        return bulk(rdma_ep_of(ep), RDMA_BULK_WRITE_IMM, mem, src, len, rmem, roff, imm, flags, cookie);
}

int rdma_read(struct tp_ep *ep, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
              unsigned flags, uint64_t cookie)
{
        return bulk(rdma_ep_of(ep), RDMA_BULK_READ, mem, dst, len, rmem, roff, 0, flags, cookie);
}

/* What a device was given cannot be taken back; what it was not given yet is not given to it. */
int rdma_cancel(struct tp_ep *base, uint64_t cookie)
{
        struct rdma_ep *ep = rdma_ep_of(base);

        if (ep->cur.active && ep->cur.cookie == cookie) {
                if (ep->cur.op < 0 && ep->state == RDMA_EP_LIVE) {
                        ep->cur.cancelled = true;
                        rdma_todo(ep);
                }
                return 0;
        }
        for (unsigned i = 0; i < ep->n_qps; i++)
                for (uint32_t seq = ep->sq[i].told; seq != ep->sq[i].head; seq++)
                        if (sq_rec(&ep->sq[i], seq)->kind == RDMA_REC_USER && sq_rec(&ep->sq[i], seq)->cookie == cookie)
                                return 0;
        for (unsigned i = 0; ep->ops && i < RDMA_OPS; i++)
                if (ep->ops[i].used && !ep->ops[i].silent && ep->ops[i].cookie == cookie)
                        return 0;
        return err_set(-ENOENT, "%s: no post with this cookie is outstanding", base->peer);
}

/* ---- closing ---- */

/* Looks at completions of this endpoint alone; those of others stay for the next poll. */
static void drain_step(struct rdma_ctx *c, struct rdma_ep *ep)
{
        if (c->wc_n + RDMA_POLL_BATCH > c->wc_cap) {
                struct ibv_wc *more = realloc(c->wc, 2 * c->wc_cap * sizeof(*more));

                if (more) {
                        c->wc = more;
                        c->wc_cap *= 2;
                }
        }
        take(c);
        for (uint32_t i = c->wc_at; i < c->wc_n; i++) {
                struct ibv_wc *wc = &c->wc[i];

                if (rdma_id_ep(c, wc->wr_id) != ep)
                        continue;
                if (!(wc->wr_id & RDMA_ID_RECV)) {
                        sq_acked(sq_of(ep, wc->wr_id), wc->wr_id, true);
                        if (wc->status != IBV_WC_SUCCESS)
                                sqs_give_up(ep);
                }
                wc->wr_id = RDMA_ID_NONE;
        }
        while (c->wc_at < c->wc_n && c->wc[c->wc_at].wr_id == RDMA_ID_NONE)
                c->wc_at++;
}

void rdma_say_bye(struct rdma_ep *ep)
{
        struct rdma_sq *s = &ep->sq[0];
        struct wr w = {.op = IBV_WR_SEND_WITH_IMM, .imm = RDMA_IMM_OF(RDMA_BYE, 0), .signal = true};

        if (!sq_room(s, 0))
                return;
        *sq_rec(s, s->head) = (struct rdma_rec){.kind = RDMA_REC_NONE, .what = "the last message (SEND)"};
        sq_post(ep, s, &w);
}

void rdma_drain(struct rdma_ep *ep, uint64_t deadline_ns)
{
        struct rdma_ctx *c = rdma_ctx_of(ep->base.ctx);
        char byte;

        let_go(ep);
        if (ep->sq[0].quiet && ep->state == RDMA_EP_LIVE && sq_room(&ep->sq[0], 0))
                post_marker(ep, &ep->sq[0], 0, false);
        for (unsigned i = 1; !sqs_drained(ep) && ep->state == RDMA_EP_LIVE; i++) {
                drain_step(c, ep);
                if (i % 64 != 0)
                        continue;
                if (clock_ns() >= deadline_ns)
                        return;
                if (ep->cm)
                        rdma_cm_progress(c);
                if (ep->fd >= 0 && recv(ep->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) >= 0)
                        return; /* the peer closes as well: nobody will look at what is under way */
        }
}
