/*
 * tcp, the hot path. No allocation, no lock, no log; a message costs one send where it is posted and one recv where it is
 * delivered.
 *
 * Order: one stream carries everything, and what a frame carries is in place before the next frame is looked at, so
 * that a message behind a write is delivered only when the bytes are there.
 *
 * Copies: a short post is copied behind its header, for the kernel takes one piece faster than two; longer ones go from
 * where they lie. At the receiver a message stays where recv put it (a loan); a bulk frame is received into its target,
 * but for what came along with its header, which is kept small (see rx_fill). Both are counted in bytes_copied.
 */
#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "err.h"
#include "tcp_private.h"

#define LIKELY(x)   __builtin_expect(!!(x), 1)
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

#define TCP_DIRECT      2u   /* up to so many endpoints are polled by recv, more by epoll */
#define TCP_APART       256u /* polls by recv after which they leave the epoll set */
#define TCP_LISTEN_TICK 256u /* while polled by recv, listeners are looked at every so many polls */
#define TCP_IOVS        64
#define TCP_BURST_BYTES (8u << 20) /* read from one endpoint before the next one gets its turn */
#define TCP_ROOM        4096u      /* least room in a chunk worth a recv */

static void ep_busy(struct tcp_ep *ep)
{
        struct tcp_ctx *c = tcp_ctx_of(ep->base.ctx);

        if (ep->busy)
                return;
        ep->busy = true;
        ep->next_busy = NULL;
        *c->busy_end = ep;
        c->busy_end = &ep->next_busy;
}

/* ---- falling ---- */

static void tx_fail_all(struct tcp_ep *ep, int status)
{
        struct tcp_tx *tx = &ep->tx;

        for (uint32_t i = tx->done; i != tx->tail; i++) {
                struct tcp_tx_item *it = &tx->item[i % TCP_TX_RING];

                if (!it->status)
                        it->status = status;
        }
        tx->done = tx->tried = tx->tail;
        tx->replies = 0;
}

/* The endpoint is lost; the sentence for the user is err_text(). */
static __attribute__((cold)) void ep_fall(struct tcp_ep *ep, int status)
{
        if (ep->state >= TCP_EP_FALLING)
                return;
        ep->state = TCP_EP_FALLING;
        ep->status = status;
        ep->more = false;
        snprintf(ep->why, sizeof(ep->why), "%s", err_text());
        tx_fail_all(ep, status);
        ep_busy(ep);
        if (!ep->drain)
                tcp_interest(ep, 0);
}

static __attribute__((cold)) void ep_protocol_error(struct tcp_ep *ep)
{
        err_trail(-EPROTO, "so the connection with %s ends", ep->base.peer);
        shutdown(ep->fd, SHUT_RDWR);
        ep_fall(ep, -EPROTO);
}

static __attribute__((cold)) void ep_eof(struct tcp_ep *ep)
{
        const struct tcp_rx *rx = &ep->rx;
        bool inside = rx->pos != rx->end || rx->state != TCP_RX_HEAD;

        if (rx->error)
                err_set(-rx->error, "%s: the connection broke: %s", ep->base.peer, strerror(rx->error));
        else
                err_set(-ECONNRESET, "%s: the peer closed the connection%s", ep->base.peer,
                        inside ? " in the middle of a frame" : "");
        ep_fall(ep, rx->error ? -rx->error : -ECONNRESET);
}

static __attribute__((cold)) int not_connected(const struct tcp_ep *ep)
{
        return err_set(-ENOTCONN, "%s: the connection is down%s%s", ep->base.peer, ep->why[0] ? ": " : "", ep->why);
}

/* ---- sending ---- */

static struct tcp_tx_item *tx_push(struct tcp_ep *ep, const struct softrma_frame *f, const void *src)
{
        struct tcp_tx *tx = &ep->tx;
        struct tcp_tx_item *it = &tx->item[tx->tail++ % TCP_TX_RING];

        it->src = src;
        it->len = softrma_payload_bytes(f);
        it->sent = 0;
        it->mem = NULL;
        it->status = 0;
        it->pad = 0;
        it->user = false;
        it->cancelled = false;
        it->head_len = (uint8_t)softrma_pack(f, it->head + SOFTRMA_ALIGN);
        return it;
}

static inline uint64_t tx_total(const struct tcp_tx_item *it)
{
        return (uint64_t)it->pad + it->head_len + it->len;
}

/* What is left of one item, as up to two pieces. */
static int tx_item_iov(const struct tcp_tx_item *it, struct iovec *iov)
{
        uint64_t front = (uint64_t)it->pad + it->head_len;
        int n = 0;

        if (it->sent < front)
                iov[n++] = (struct iovec){(void *)(it->head + SOFTRMA_ALIGN - it->pad + it->sent), front - it->sent};
        if (it->len) {
                uint64_t skip = it->sent > front ? it->sent - front : 0;

                iov[n++] = (struct iovec){(void *)(it->src + skip), it->len - skip};
        }
        return n;
}

/* The item's place on the stream is decided now: behind it nothing can be taken back any more. */
static inline void tx_try(struct tcp_ep *ep, struct tcp_tx_item *it)
{
        it->pad = (uint8_t)ep->tx.pad_owed;
        ep->tx.pad_owed = softrma_pad(it->len);
        ep->base.n.header_bytes_tx += (uint64_t)it->pad + it->head_len;
}

static int tx_gather(struct tcp_ep *ep, struct iovec *iov, uint64_t *bytes)
{
        struct tcp_tx *tx = &ep->tx;
        int n = 0;

        *bytes = 0;
        for (uint32_t i = tx->done; i != tx->tail && n + 2 <= TCP_IOVS; i++) {
                struct tcp_tx_item *it = &tx->item[i % TCP_TX_RING];

                if (i == tx->tried) {
                        tx->tried++;
                        if (!it->cancelled)
                                tx_try(ep, it);
                }
                if (it->cancelled)
                        continue;
                n += tx_item_iov(it, iov + n);
                *bytes += tx_total(it) - it->sent;
        }
        return n;
}

static void tx_advance(struct tcp_tx *tx, uint64_t sent)
{
        while (tx->done != tx->tried) {
                struct tcp_tx_item *it = &tx->item[tx->done % TCP_TX_RING];

                if (!it->cancelled) {
                        uint64_t left = tx_total(it) - it->sent;

                        if (sent < left) {
                                it->sent += sent;
                                return;
                        }
                        sent -= left;
                        it->sent += left;
                }
                if (it->mem)
                        tx->replies--;
                tx->done++;
        }
}

static bool send_would_block(void)
{
        return errno == EAGAIN || errno == EINTR || errno == ENOBUFS;
}

void tcp_flush(struct tcp_ep *ep)
{
        struct tcp_tx *tx = &ep->tx;

        while (tx->done != tx->tail && !tx->full && !tx->dead) {
                struct iovec iov[TCP_IOVS];
                struct msghdr m = {.msg_iov = iov};
                uint64_t bytes;
                ssize_t n = 0;

                m.msg_iovlen = (size_t)tx_gather(ep, iov, &bytes);
                if (m.msg_iovlen)
                        n = sendmsg(ep->fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
                if (UNLIKELY(n < 0)) {
                        if (send_would_block())
                                tx->full = true;
                        else
                                tx->dead = -errno; /* what the peer sent before it died is read first: see ep_eof */
                        return;
                }
                tx_advance(tx, (uint64_t)n);
                tx->full = (uint64_t)n < bytes;
        }
}

static struct tcp_tx_item *push_post(struct tcp_ep *ep, const struct softrma_frame *f, const void *src, uint64_t cookie)
{
        struct tcp_tx_item *it = tx_push(ep, f, src);

        it->user = true;
        it->cookie = cookie;
        ep->tx.users++;
        return it;
}

/* The kernel took only the beginning of a small post: the rest is queued like that of any other. */
static __attribute__((cold, noinline)) int post_rest(struct tcp_ep *ep, const struct softrma_frame *f, const void *src,
                                                     uint64_t cookie, size_t sent)
{
        struct tcp_tx_item *it = push_post(ep, f, src, cookie);

        ep->tx.tried++;
        tx_try(ep, it);
        it->sent = sent;
        ep->tx.full = true;
        ep_busy(ep);
        return TP_POSTED;
}

/*
 * Nothing is queued and the payload is short: one send of one piece. Walking a vector of pieces costs the kernel more
 * than copying the payload behind its header costs us. TP_COMPLETE, TP_POSTED, -ENOTCONN; -EAGAIN: the kernel takes
 * nothing now, so it is to be queued.
 */
static inline int post_small(struct tcp_ep *ep, const struct softrma_frame *f, const void *src, size_t len,
                             uint64_t cookie)
{
        struct tcp_tx *tx = &ep->tx;
        size_t head = SOFTRMA_HEAD_MIN, total;
        ssize_t n;

        if (f->kind == SOFTRMA_MSG)
                softrma_pack_msg(len, ep->small + SOFTRMA_ALIGN);
        else
                head = softrma_pack(f, ep->small + SOFTRMA_ALIGN);
        total = tx->pad_owed + head + len;
        if (len) {
                memcpy(ep->small + SOFTRMA_ALIGN + head, src, len);
                ep->base.n.bytes_copied += len;
        }
        n = send(ep->fd, ep->small + SOFTRMA_ALIGN - tx->pad_owed, total, MSG_NOSIGNAL);
        if (LIKELY(n == (ssize_t)total)) {
                ep->base.n.header_bytes_tx += tx->pad_owed + head;
                tx->pad_owed = softrma_pad(len);
                if (UNLIKELY(tx->told != tx->done))
                        ep_busy(ep);
                return TP_COMPLETE;
        }
        if (n > 0)
                return post_rest(ep, f, src, cookie, (size_t)n);
        if (send_would_block()) {
                tx->full = true;
                return -EAGAIN;
        }
        tx->dead = -errno;
        return not_connected(ep);
}

static int post(struct tcp_ep *ep, const struct softrma_frame *f, const void *src, unsigned flags, uint64_t cookie)
{
        uint64_t len = softrma_payload_bytes(f);
        struct tcp_tx *tx = &ep->tx;
        struct tcp_tx_item *it;

        if (UNLIKELY(ep->state != TCP_EP_LIVE || tx->dead))
                return not_connected(ep);
        if (UNLIKELY(tx->users == TCP_TX_DEPTH)) {
                ep->base.n.eagain++;
                return -EAGAIN;
        }
        if (LIKELY(len <= TCP_SMALL && tx->done == tx->tail && !tx->full && !(flags & TP_MORE))) {
                int rc = post_small(ep, f, src, len, cookie);

                if (LIKELY(rc != -EAGAIN))
                        return rc;
        }
        it = push_post(ep, f, src, cookie);
        if (!(flags & TP_MORE))
                tcp_flush(ep);
        if (LIKELY(tx->done == tx->tail)) { /* all of it is with the kernel: no event needed */
                tx->users--;
                tx->tail--;
                tx->done--;
                tx->tried--;
                if (UNLIKELY(tx->told != tx->done))
                        ep_busy(ep);
                return TP_COMPLETE;
        }
        if (UNLIKELY(tx->dead && !it->sent && tx->done == tx->tail - 1)) {
                tx->users--;
                tx->tail--;
                tx->tried = tx->done;
                return not_connected(ep);
        }
        ep_busy(ep);
        return TP_POSTED;
}

int tcp_send(struct tp_ep *base, const void *buf, size_t len, unsigned flags, uint64_t cookie)
{
        struct tcp_ep *ep = tcp_ep_of(base);
        struct softrma_frame f = {.kind = SOFTRMA_MSG, .len = len};
        int rc;

        if (UNLIKELY(len > ep->peer_msg_max))
                return err_set(-EMSGSIZE, "%s: a message of %zu bytes; the most is %zu", base->peer, len,
                               ep->peer_msg_max);
        rc = post(ep, &f, buf, flags, cookie);
        if (LIKELY(rc >= 0)) {
                base->n.msgs_tx++;
                base->n.msg_bytes_tx += len;
        }
        return rc;
}

static __attribute__((cold)) int out_of_range(const struct tcp_ep *ep, const char *what)
{
        return err_set(-ERANGE, "%s: the bytes lie outside of %s", ep->base.peer, what);
}

/* Both ends of a bulk post are checked here, before anything is queued. */
static int bulk_check(const struct tcp_ep *ep, const struct tp_mem *mem, const void *p, size_t len,
                      const struct tp_rmem *rmem, uint64_t roff)
{
        if (UNLIKELY(rmem->ep != &ep->base || (mem && mem->ep != &ep->base)))
                return err_set(-EINVAL, "%s: memory of another connection", ep->base.peer);
        if (UNLIKELY(roff > rmem->len || len > rmem->len - roff))
                return out_of_range(ep, "the peer's memory");
        if (mem) {
                uint64_t off = (uint64_t)((uintptr_t)p - (uintptr_t)mem->region.addr);

                if (UNLIKELY(off > mem->region.len || len > mem->region.len - off))
                        return out_of_range(ep, "the memory named");
        }
        return 0;
}

static inline struct softrma_frame bulk_frame(enum softrma_kind kind, const struct tp_rmem *rmem, uint64_t roff,
                                              size_t len, uint32_t imm)
{
        const struct tcp_rmem *r = container_of(rmem, struct tcp_rmem, base);

        return (struct softrma_frame){
            .kind = kind,
            .imm = imm,
            .len = len,
            .key_id = r->key.id,
            .key_epoch = r->key.epoch,
            .key_nonce = r->key.nonce,
            .off = roff,
        };
}

static int bulk_post(struct tcp_ep *ep, enum softrma_kind kind, struct tp_mem *mem, const void *src, size_t len,
                     struct tp_rmem *rmem, uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        struct softrma_frame f;
        int rc = bulk_check(ep, mem, src, len, rmem, roff);

        if (UNLIKELY(rc < 0))
                return rc;
        f = bulk_frame(kind, rmem, roff, len, imm);
        rc = post(ep, &f, src, flags, cookie);
        if (LIKELY(rc >= 0)) {
                ep->base.n.bulk_ops++;
                ep->base.n.bulk_bytes_tx += len;
        }
        return rc;
}

int tcp_write(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem, uint64_t roff,
              unsigned flags, uint64_t cookie)
{
        return bulk_post(tcp_ep_of(ep), SOFTRMA_WRITE, mem, src, len, rmem, roff, 0, flags, cookie);
}

int tcp_write_imm(struct tp_ep *ep, struct tp_mem *mem, const void *src, size_t len, struct tp_rmem *rmem,
                  uint64_t roff, uint32_t imm, unsigned flags, uint64_t cookie)
{
        return bulk_post(tcp_ep_of(ep), SOFTRMA_WRITE_IMM, mem, src, len, rmem, roff, imm, flags, cookie);
}

int tcp_read(struct tp_ep *base, struct tp_mem *mem, void *dst, size_t len, struct tp_rmem *rmem, uint64_t roff,
             unsigned flags, uint64_t cookie)
{
        struct tcp_ep *ep = tcp_ep_of(base);
        struct tcp_reads *reads = &ep->reads;
        struct softrma_frame f;
        int rc = bulk_check(ep, mem, dst, len, rmem, roff);

        if (UNLIKELY(rc < 0))
                return rc;
        if (UNLIKELY(ep->state != TCP_EP_LIVE || ep->tx.dead))
                return not_connected(ep);
        if (UNLIKELY(reads->tail - reads->head == TCP_READS)) {
                base->n.eagain++;
                return -EAGAIN;
        }
        f = bulk_frame(SOFTRMA_READ_REQ, rmem, roff, len, reads->tail);
        tx_push(ep, &f, NULL);
        reads->slot[reads->tail++ % TCP_READS] =
            (struct tcp_read){.state = TCP_READ_WAITS, .dst = dst, .len = len, .cookie = cookie, .mem = mem};
        base->n.bulk_ops++;
        if (!(flags & TP_MORE))
                tcp_flush(ep);
        ep_busy(ep);
        return TP_POSTED;
}

static bool cancel_post(struct tcp_ep *ep, uint64_t cookie)
{
        struct tcp_tx *tx = &ep->tx;

        for (uint32_t i = tx->told; i != tx->tail; i++) {
                struct tcp_tx_item *it = &tx->item[i % TCP_TX_RING];

                if (!it->user || it->cookie != cookie || it->cancelled)
                        continue;
                if ((int32_t)(i - tx->tried) >= 0) { /* else too late: it ends with its result */
                        it->cancelled = true;
                        it->status = -ECANCELED;
                }
                return true;
        }
        return false;
}

static void read_leave(struct tcp_ep *ep, struct tcp_read *r)
{
        r->state = TCP_READ_CANCELLED;
        ep->reads.untold++;
        ep_busy(ep);
}

int tcp_cancel(struct tp_ep *base, uint64_t cookie)
{
        struct tcp_ep *ep = tcp_ep_of(base);
        struct tcp_reads *reads = &ep->reads;

        ep_busy(ep);
        if (cancel_post(ep, cookie))
                return 0;
        for (uint32_t i = reads->head; i != reads->tail; i++) {
                struct tcp_read *r = &reads->slot[i % TCP_READS];

                if (r->cookie == cookie && r->state == TCP_READ_WAITS) {
                        read_leave(ep, r);
                        return 0;
                }
        }
        return err_set(-ENOENT, "%s: no operation with this cookie is outstanding", base->peer);
}

/* An answer of which nothing has been sent becomes a refusal. */
static void reply_refuse(struct tcp_tx_item *it)
{
        struct softrma_frame f;
        int rc = softrma_unpack(it->head + SOFTRMA_ALIGN, it->head_len, 0, &f);

        BUG_ON(rc <= 0);
        f.kind = SOFTRMA_READ_NACK;
        f.len = ESTALE;
        it->head_len = (uint8_t)softrma_pack(&f, it->head + SOFTRMA_ALIGN);
        it->src = NULL;
        it->len = 0;
}

void tcp_forget_mem(struct tcp_ep *ep, const struct tp_mem *mem)
{
        struct tcp_reads *reads = &ep->reads;

        softrma_revoke(&ep->keys, mem);
        for (uint32_t i = reads->head; i != reads->tail; i++) {
                struct tcp_read *r = &reads->slot[i % TCP_READS];

                if (r->mem == mem && r->state == TCP_READ_WAITS)
                        read_leave(ep, r);
        }
        for (uint32_t i = ep->tx.done; i != ep->tx.tail; i++) {
                struct tcp_tx_item *it = &ep->tx.item[i % TCP_TX_RING];

                if (it->mem != mem)
                        continue;
                if ((int32_t)(i - ep->tx.tried) >= 0) {
                        reply_refuse(it);
                        continue;
                }
                /* The answer's length is promised already and its bytes are going away. */
                err_set(-ESTALE, "%s: memory was freed while the peer was reading it", ep->base.peer);
                shutdown(ep->fd, SHUT_RDWR);
                ep_fall(ep, -ESTALE);
                return;
        }
}

/* ---- receiving ---- */

/* How a step of parsing ended: NEED more bytes (or stalled, or the end); GO on; an EVENT was filled in. */
enum rx_step { RX_NEED = -1, RX_GO = 0, RX_EVENT = 1 };

void tcp_release(struct tp_ep *base, uint64_t loan)
{
        struct tcp_rx *rx = &tcp_ep_of(base)->rx;
        struct tcp_chunk *c;

        BUG_ON(loan >= TCP_CHUNKS);
        c = &rx->chunk[loan];
        BUG_ON(!c->refs);
        if (--c->refs == 0 && loan != rx->cur) {
                c->next_free = rx->free;
                rx->free = (uint32_t)loan;
        }
}

/* A write that we will not take. What was posted before goes out first, then the reason; what comes in is ignored. */
static __attribute__((cold)) enum rx_step refuse_write(struct tcp_ep *ep, const struct softrma_frame *w, int status)
{
        struct softrma_frame f = {.kind = SOFTRMA_REFUSED, .len = (uint64_t)-status};

        err_set(status, "%s: the peer wrote %llu bytes %s, which ends the connection", ep->base.peer,
                (unsigned long long)w->len,
                status == -ERANGE   ? "beyond the memory that its key opens"
                : status == -ESTALE ? "with a key that has expired"
                                    : "with a key that was never given out");
        snprintf(ep->why, sizeof(ep->why), "%s", err_text());
        tx_push(ep, &f, NULL);
        ep->state = TCP_EP_REFUSING;
        ep->status = status;
        ep->drain = true;
        ep_busy(ep);
        return RX_NEED;
}

static enum rx_step bulk_begin(struct tcp_ep *ep, const struct softrma_frame *f, enum tcp_rx_state state)
{
        struct tcp_rx *rx = &ep->rx;

        rx->frame = *f;
        rx->left = f->len;
        rx->state = state;
        if (f->len >= TCP_LEAN_FROM)
                rx->lean = TCP_LEAN_SPAN;
        return RX_GO;
}

/* The header has been used up; its payload and then padding follow. */
static inline void rx_take_head(struct tcp_ep *ep, int head, uint64_t payload)
{
        ep->rx.pos += (size_t)head;
        ep->rx.skip = softrma_pad(payload);
        ep->base.n.header_bytes_rx += (uint64_t)head + ep->rx.skip;
}

static inline enum rx_step take_msg(struct tcp_ep *ep, uint64_t len, struct tp_event *ev)
{
        struct tcp_rx *rx = &ep->rx;
        struct tcp_chunk *c = &rx->chunk[rx->cur];

        if (UNLIKELY(rx->end - rx->pos < SOFTRMA_HEAD_MIN + len)) {
                rx->want = SOFTRMA_HEAD_MIN + len;
                return RX_NEED;
        }
        rx_take_head(ep, SOFTRMA_HEAD_MIN, len);
        *ev = (struct tp_event){
            .kind = TP_EV_MSG, .ep = &ep->base, .data = c->data + rx->pos, .len = len, .cookie = rx->cur};
        c->refs++;
        rx->pos += len;
        if (rx->lean)
                rx->lean--;
        ep->base.n.msgs_rx++;
        ep->base.n.msg_bytes_rx += len;
        return RX_EVENT;
}

static enum rx_step on_msg(struct tcp_ep *ep, const struct softrma_frame *f, int head, struct tp_event *ev)
{
        return take_msg(ep, f->len, ev);
}

static enum rx_step on_write(struct tcp_ep *ep, const struct softrma_frame *f, int head, struct tp_event *ev)
{
        const void *owner;
        uint8_t *dst;
        int rc = softrma_resolve(&ep->keys, f, f->off, f->len, &dst, &owner);

        if (UNLIKELY(rc < 0))
                return refuse_write(ep, f, rc);
        rx_take_head(ep, head, f->len);
        return bulk_begin(ep, f, TCP_RX_BULK);
}

static enum rx_step on_read_req(struct tcp_ep *ep, const struct softrma_frame *f, int head, struct tp_event *ev)
{
        struct softrma_frame answer = {.kind = SOFTRMA_READ_RESP, .imm = f->imm, .len = f->len};
        struct tcp_tx_item *it;
        const void *owner = &ep->keys; /* of a refusal: counts as an answer, and is nobody's memory */
        uint8_t *src = NULL;
        int rc;

        if (UNLIKELY(ep->tx.dead)) { /* nobody is there to read an answer */
                rx_take_head(ep, head, 0);
                return RX_GO;
        }
        if (UNLIKELY(ep->tx.replies >= TCP_READS)) {
                ep->rx.stalled = true;
                return RX_NEED;
        }
        rc = softrma_resolve(&ep->keys, f, f->off, f->len, &src, &owner);
        if (rc < 0)
                answer = (struct softrma_frame){.kind = SOFTRMA_READ_NACK, .imm = f->imm, .len = (uint64_t)-rc};
        it = tx_push(ep, &answer, src);
        it->mem = owner;
        ep->tx.replies++;
        rx_take_head(ep, head, 0);
        return RX_GO;
}

/* The read that an answer must be for, or NULL: the peer lies. */
static struct tcp_read *read_answered(struct tcp_ep *ep, const struct softrma_frame *f)
{
        struct tcp_reads *reads = &ep->reads;

        if (reads->head == reads->tail || f->imm != reads->head) {
                err_set(-EPROTO, "%s: an answer to a read that was not asked", ep->base.peer);
                ep_protocol_error(ep);
                return NULL;
        }
        return &reads->slot[reads->head % TCP_READS];
}

static enum rx_step read_end(struct tcp_ep *ep, int status, struct tp_event *ev)
{
        struct tcp_reads *reads = &ep->reads;
        const struct tcp_read *r = &reads->slot[reads->head++ % TCP_READS];

        if (r->state == TCP_READ_LEFT)
                return RX_GO;
        if (r->state == TCP_READ_CANCELLED) { /* too late, or refused: the user learns it now */
                reads->untold--;
                status = -ECANCELED;
        }
        if (!status)
                ep->base.n.bulk_bytes_rx += r->len;
        *ev = (struct tp_event){.kind = TP_EV_DONE, .ep = &ep->base, .status = status, .cookie = r->cookie};
        return RX_EVENT;
}

static enum rx_step on_read_resp(struct tcp_ep *ep, const struct softrma_frame *f, int head, struct tp_event *ev)
{
        const struct tcp_read *r = read_answered(ep, f);

        if (!r)
                return RX_NEED;
        if (UNLIKELY(r->len != f->len)) {
                err_set(-EPROTO, "%s: %llu bytes were asked for and %llu are answered", ep->base.peer,
                        (unsigned long long)r->len, (unsigned long long)f->len);
                ep_protocol_error(ep);
                return RX_NEED;
        }
        rx_take_head(ep, head, f->len);
        return bulk_begin(ep, f, TCP_RX_BULK);
}

static enum rx_step on_read_nack(struct tcp_ep *ep, const struct softrma_frame *f, int head, struct tp_event *ev)
{
        if (!read_answered(ep, f))
                return RX_NEED;
        rx_take_head(ep, head, 0);
        return read_end(ep, -(int)f->len, ev);
}

static enum rx_step on_refused(struct tcp_ep *ep, const struct softrma_frame *f, int head, struct tp_event *ev)
{
        err_set(-(int)f->len, "%s: the peer refused a write: %s", ep->base.peer, strerror((int)f->len));
        rx_take_head(ep, head, 0);
        ep_fall(ep, -(int)f->len);
        return RX_NEED;
}

static enum rx_step (*const on_frame[SOFTRMA_KINDS])(struct tcp_ep *ep, const struct softrma_frame *f, int head,
                                                     struct tp_event *ev) = {
    [SOFTRMA_MSG] = on_msg,           [SOFTRMA_WRITE] = on_write,         [SOFTRMA_WRITE_IMM] = on_write,
    [SOFTRMA_READ_REQ] = on_read_req, [SOFTRMA_READ_RESP] = on_read_resp, [SOFTRMA_READ_NACK] = on_read_nack,
    [SOFTRMA_REFUSED] = on_refused,
};

static enum rx_step rx_head(struct tcp_ep *ep, struct tp_event *ev)
{
        struct tcp_rx *rx = &ep->rx;
        const uint8_t *at;
        struct softrma_frame f;
        uint64_t len;
        int head;

        if (rx->skip) {
                size_t n = rx->end - rx->pos < rx->skip ? rx->end - rx->pos : rx->skip;

                rx->pos += n;
                rx->skip -= (unsigned)n;
        }
        rx->want = SOFTRMA_ALIGN + SOFTRMA_HEAD_MAX;
        if (rx->pos == rx->end)
                return RX_NEED;
        at = rx->chunk[rx->cur].data + rx->pos;
        if (LIKELY(softrma_is_msg(at, rx->end - rx->pos, TCP_MSG_MAX, &len)))
                return take_msg(ep, len, ev);
        head = softrma_unpack(at, rx->end - rx->pos, TCP_MSG_MAX, &f);
        if (LIKELY(head > 0))
                return on_frame[f.kind](ep, &f, head, ev);
        if (head < 0)
                ep_protocol_error(ep);
        return RX_NEED;
}

/* Where the rest of the arriving bulk goes. Asked anew each time, for its memory may have gone meanwhile: NULL then,
 * and either the connection is ending or the rest is to be thrown away. */
static uint8_t *bulk_target(struct tcp_ep *ep)
{
        struct tcp_rx *rx = &ep->rx;
        uint64_t got = rx->frame.len - rx->left;
        const struct tcp_read *r;
        const void *owner;
        uint8_t *dst;
        int rc;

        if (rx->frame.kind == SOFTRMA_READ_RESP) {
                r = &ep->reads.slot[ep->reads.head % TCP_READS];
                if (r->state == TCP_READ_WAITS)
                        return r->dst + got;
                rx->state = TCP_RX_DISCARD;
                return NULL;
        }
        rc = softrma_resolve(&ep->keys, &rx->frame, rx->frame.off + got, rx->left, &dst, &owner);
        if (LIKELY(!rc))
                return dst;
        refuse_write(ep, &rx->frame, rc);
        return NULL;
}

static enum rx_step bulk_end(struct tcp_ep *ep, struct tp_event *ev)
{
        struct tcp_rx *rx = &ep->rx;

        rx->state = TCP_RX_HEAD;
        if (rx->frame.kind == SOFTRMA_READ_RESP)
                return read_end(ep, 0, ev);
        ep->base.n.bulk_bytes_rx += rx->frame.len;
        if (rx->frame.kind == SOFTRMA_WRITE)
                return RX_GO;
        *ev = (struct tp_event){.kind = TP_EV_IMM, .ep = &ep->base, .len = rx->frame.len, .imm = rx->frame.imm};
        return RX_EVENT;
}

/* What of the bulk came along with its header. */
static enum rx_step rx_bulk(struct tcp_ep *ep, struct tp_event *ev)
{
        struct tcp_rx *rx = &ep->rx;
        size_t n = rx->end - rx->pos < rx->left ? rx->end - rx->pos : (size_t)rx->left;

        if (n) {
                uint8_t *dst = rx->state == TCP_RX_BULK ? bulk_target(ep) : NULL;

                if (dst) {
                        memcpy(dst, rx->chunk[rx->cur].data + rx->pos, n);
                        ep->base.n.bytes_copied += n;
                } else if (ep->state != TCP_EP_LIVE) {
                        return RX_NEED;
                }
                rx->pos += n;
                rx->left -= n;
        }
        if (!rx->left)
                return bulk_end(ep, ev);
        rx->want = 0;
        return RX_NEED;
}

static int rx_parse(struct tcp_ep *ep, struct tp_event *ev, int max)
{
        struct tcp_rx *rx = &ep->rx;
        int n = 0;

        rx->stalled = false;
        ep->more = false;
        for (;;) {
                enum rx_step step;

                if (n == max) {
                        ep->more = rx->pos != rx->end || (rx->state != TCP_RX_HEAD && !rx->left);
                        return n;
                }
                step = rx->state == TCP_RX_HEAD ? rx_head(ep, ev + n) : rx_bulk(ep, ev + n);
                if (step == RX_NEED)
                        return n;
                n += step;
        }
}

/*
 * Makes the current chunk able to take what is wanted from pos on. What has been parsed and released costs nothing:
 * an empty chunk is used again from its start, so a ping-pong stays in the same few cache lines. Only the head of a
 * frame that does not fit behind its predecessors moves. The next header must come to lie on a multiple of 8.
 */
static bool rx_make_room(struct tcp_ep *ep)
{
        struct tcp_rx *rx = &ep->rx;
        struct tcp_chunk *c = &rx->chunk[rx->cur];
        size_t have = rx->end - rx->pos, need = rx->want > TCP_ROOM ? rx->want : TCP_ROOM;
        size_t at = have ? rx->pos % SOFTRMA_ALIGN : (SOFTRMA_ALIGN - rx->skip) % SOFTRMA_ALIGN;
        uint32_t to = rx->cur;

        if (!have)
                rx->pos = rx->end = c->refs ? ALIGN_UP(rx->end, SOFTRMA_ALIGN) + at : at;
        if (LIKELY(rx->pos + need <= TCP_CHUNK))
                return true;
        if (c->refs) {
                to = rx->free;
                if (to == TCP_NO_CHUNK) {
                        rx->stalled = true;
                        return false;
                }
                rx->free = rx->chunk[to].next_free;
        }
        memmove(rx->chunk[to].data + at, c->data + rx->pos, have);
        ep->base.n.bytes_copied += have;
        rx->cur = to;
        rx->pos = at;
        rx->end = at + have;
        return true;
}

/*
 * One recv. A bulk goes straight to its target, and what follows it (the message that announces it, mostly) comes
 * with the same system call. Reading ahead is what brings many small messages in one call, but it also brings the start
 * of a bulk frame into the chunk, from where it must be copied; so while bulk frames are about, little is read ahead.
 * *asked: bytes that would have fitted.
 */
static ssize_t rx_fill(struct tcp_ep *ep, size_t *asked)
{
        struct tcp_rx *rx = &ep->rx;
        struct iovec iov[2];
        size_t room, ahead, direct = 0;
        int n_iov = 0;
        ssize_t got;

        if (!rx_make_room(ep))
                return 0;
        room = TCP_CHUNK - rx->end;
        ahead = rx->lean && rx->state != TCP_RX_DISCARD ? TCP_LEAN_BYTES : room;
        if (rx->want > rx->end - rx->pos)
                ahead += rx->want - (rx->end - rx->pos);
        ahead = ahead < room ? ahead : room;
        if (rx->state == TCP_RX_BULK) {
                uint8_t *dst = bulk_target(ep);

                if (ep->state != TCP_EP_LIVE)
                        return 0;
                if (dst) {
                        direct = rx->left < SSIZE_MAX / 2 ? (size_t)rx->left : SSIZE_MAX / 2;
                        iov[n_iov++] = (struct iovec){dst, direct};
                }
        }
        iov[n_iov++] = (struct iovec){rx->chunk[rx->cur].data + rx->end, ahead};
        *asked = direct + ahead;
        got = n_iov == 1 ? recv(ep->fd, iov[0].iov_base, ahead, 0) : readv(ep->fd, iov, n_iov);
        if (UNLIKELY(got <= 0)) {
                if (got < 0 && (errno == EAGAIN || errno == EINTR))
                        return 0;
                rx->eof = true;
                rx->error = got < 0 ? errno : 0;
                return 0;
        }
        direct = (size_t)got < direct ? (size_t)got : direct;
        rx->left -= direct;
        rx->end += (size_t)got - direct;
        return got;
}

/* Reads and parses until there is an event, or nothing more to read. */
static inline int rx_more(struct tcp_ep *ep, struct tp_event *ev, int max)
{
        uint64_t burst = 0;
        int n = 0;

        while (burst < TCP_BURST_BYTES && !ep->rx.stalled) {
                size_t asked;
                ssize_t got = rx_fill(ep, &asked);

                if (got <= 0)
                        break;
                n = rx_parse(ep, ev, max);
                if (n || ep->state != TCP_EP_LIVE || (size_t)got < asked)
                        break;
                burst += (uint64_t)got;
        }
        if (UNLIKELY(ep->rx.eof && !n && ep->state == TCP_EP_LIVE))
                ep_eof(ep);
        return n;
}

static int rx(struct tcp_ep *ep, struct tp_event *ev, int max, bool readable)
{
        int n = rx_parse(ep, ev, max);

        return n || !readable || ep->state != TCP_EP_LIVE ? n : rx_more(ep, ev, max);
}

/* ---- polling ---- */

static int tell_done(struct tcp_ep *ep, struct tp_event *ev, int max)
{
        struct tcp_tx *tx = &ep->tx;
        int n = 0;

        for (; tx->told != tx->done && n < max; tx->told++) {
                const struct tcp_tx_item *it = &tx->item[tx->told % TCP_TX_RING];

                if (!it->user)
                        continue;
                tx->users--;
                ev[n++] =
                    (struct tp_event){.kind = TP_EV_DONE, .ep = &ep->base, .status = it->status, .cookie = it->cookie};
        }
        return n;
}

static int tell_cancelled(struct tcp_ep *ep, struct tp_event *ev, int max)
{
        struct tcp_reads *reads = &ep->reads;
        int n = 0;

        for (uint32_t i = reads->head; i != reads->tail && n < max && reads->untold; i++) {
                struct tcp_read *r = &reads->slot[i % TCP_READS];

                if (r->state != TCP_READ_CANCELLED)
                        continue;
                r->state = TCP_READ_LEFT;
                reads->untold--;
                ev[n++] =
                    (struct tp_event){.kind = TP_EV_DONE, .ep = &ep->base, .status = -ECANCELED, .cookie = r->cookie};
        }
        return n;
}

static int tell_fall(struct tcp_ep *ep, struct tp_event *ev, int max)
{
        struct tcp_reads *reads = &ep->reads;
        int n = tell_done(ep, ev, max);

        while (reads->head != reads->tail && n < max)
                n += read_end(ep, ep->status, ev + n) == RX_EVENT;
        if (ep->tx.told != ep->tx.done || reads->head != reads->tail || n == max)
                return n;
        err_set(ep->status, "%s", ep->why);
        ev[n++] = (struct tp_event){.kind = TP_EV_DOWN, .ep = &ep->base, .status = ep->status};
        ep->state = TCP_EP_DOWN;
        return n;
}

/* Nothing that comes any more is of interest, but as long as it lies unread a close would reset the connection, and
 * the peer might never learn why. */
static void ep_drain(struct tcp_ep *ep)
{
        ssize_t n;

        do {
                n = recv(ep->fd, NULL, 1u << 20, MSG_TRUNC | MSG_DONTWAIT);
        } while (n > 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
                return;
        ep->drain = false;
        tcp_interest(ep, 0);
}

static void ep_refusing(struct tcp_ep *ep)
{
        ep_drain(ep);
        if (ep->tx.done != ep->tx.tail && !ep->tx.dead && ep->drain)
                return;
        shutdown(ep->fd, SHUT_WR);
        err_set(ep->status, "%s", ep->why);
        ep_fall(ep, ep->status);
}

static bool ep_has_work(const struct tcp_ep *ep)
{
        return ep->more || ep->tx.told != ep->tx.done || ep->reads.untold || ep->state == TCP_EP_FALLING;
}

/* Nothing is owed to the user or to the peer and no frame has begun: so a ping-pong finds it whenever it polls. */
static inline bool ep_at_rest(const struct tcp_ep *ep)
{
        const struct tcp_tx *tx = &ep->tx;
        const struct tcp_rx *rx = &ep->rx;

        return !(ep->state | ep->more | tx->full | (tx->done ^ tx->tail) | (tx->told ^ tx->done) | rx->state |
                 rx->stalled | (rx->pos ^ rx->end) | ep->reads.untold);
}

static_assert(TCP_EP_LIVE == 0 && TCP_RX_HEAD == 0, "ep_at_rest");

/* What is owed first, then what came. */
static int ep_poll_owed(struct tcp_ep *ep, struct tp_event *ev, int max, bool readable)
{
        struct tcp_tx *tx = &ep->tx;
        int n = 0;

        tx->full = false;
        if (tx->done != tx->tail)
                tcp_flush(ep);
        if (tx->told != tx->done)
                n = tell_done(ep, ev, max);
        if (UNLIKELY(ep->reads.untold))
                n += tell_cancelled(ep, ev + n, max - n);
        if (LIKELY(ep->state == TCP_EP_LIVE && n < max))
                n += rx(ep, ev + n, max - n, readable);
        return n;
}

/* What followed from that: n events are there already. */
static int ep_settle(struct tcp_ep *ep, struct tp_event *ev, int n, int max)
{
        struct tcp_tx *tx = &ep->tx;

        if (tx->replies)
                tcp_flush(ep);
        if (UNLIKELY(ep->state == TCP_EP_REFUSING))
                ep_refusing(ep);
        if (UNLIKELY(ep->state == TCP_EP_FALLING && n < max))
                n += tell_fall(ep, ev + n, max - n);
        if (UNLIKELY(ep->state == TCP_EP_LIVE && !ep->rx.stalled && !(ep->interest & EPOLLIN)) &&
            !tcp_ctx_of(ep->base.ctx)->apart)
                tcp_interest(ep, ep->interest | EPOLLIN); /* tcp_arm took it away */
        if (ep_has_work(ep) || tx->done != tx->tail || ep->rx.stalled)
                ep_busy(ep);
        return n;
}

/* readable: the descriptor may have something to read. */
static int ep_poll(struct tcp_ep *ep, struct tp_event *ev, int max, bool readable)
{
        int n;

        if (LIKELY(readable && max > 0 && ep_at_rest(ep))) {
                n = rx_more(ep, ev, max);
                return LIKELY(ep_at_rest(ep)) ? n : ep_settle(ep, ev, n, max);
        }
        if (UNLIKELY(ep->state == TCP_EP_DOWN)) {
                if (ep->drain)
                        ep_drain(ep);
                return 0;
        }
        n = ep_poll_owed(ep, ev, max, readable);
        return ep_settle(ep, ev, n, max);
}

static struct tcp_ep *busy_pop(struct tcp_ctx *c)
{
        struct tcp_ep *ep = c->busy;

        if (!ep)
                return NULL;
        c->busy = ep->next_busy;
        if (!c->busy)
                c->busy_end = &c->busy;
        ep->busy = false;
        return ep;
}

/* Endpoints that have something to do without the kernel telling. */
static int poll_busy(struct tcp_ctx *c, struct tp_event *ev, int max)
{
        struct tcp_ep **last = c->busy_end; /* what ep_poll puts behind this is for the next time */
        int n = 0;

        while (c->busy && n < max) {
                bool end = last == &c->busy->next_busy;

                n += ep_poll(busy_pop(c), ev + n, max - n, false);
                if (end)
                        break;
        }
        return n;
}

static int poll_many(struct tcp_ctx *c, struct tp_event *ev, int max)
{
        struct epoll_event got[64];
        int n = poll_busy(c, ev, max);
        int ready = n < max ? epoll_wait(c->epfd, got, ARRAY_LEN(got), 0) : 0;

        for (int i = 0; i < ready; i++) {
                enum tcp_tag *who = got[i].data.ptr;
                struct tcp_ep *ep = container_of(who, struct tcp_ep, tag);

                if (*who != TCP_TAG_EP) {
                        tcp_setup_progress(c, who);
                        continue;
                }
                if (n == max)
                        continue; /* epoll is level-triggered: it will say so again */
                n += ep_poll(ep, ev + n, max - n, true);
                if ((got[i].events & EPOLLOUT) && ep->tx.done == ep->tx.tail && ep->interest)
                        tcp_interest(ep, EPOLLIN);
        }
        return n;
}

static uint32_t ep_wants(const struct tcp_ep *ep)
{
        if (ep->state >= TCP_EP_FALLING)
                return ep->drain ? EPOLLIN : 0;
        return (ep->rx.stalled ? 0 : EPOLLIN) | (ep->tx.done != ep->tx.tail ? EPOLLOUT : 0);
}

int tcp_together(struct tcp_ctx *c)
{
        for (struct tcp_ep *ep = c->eps; c->apart && ep; ep = ep->next) {
                int rc = tcp_interest(ep, ep_wants(ep));

                if (rc < 0)
                        return rc;
        }
        c->apart = false;
        c->directly = 0;
        return 0;
}

/*
 * Who polls by recv for long is better not in the epoll set: there each arrival costs the peer, whose send delivers it
 * on one host, a callback of 0.1 us. Who wants to sleep comes back (tcp_arm); that is why it does not happen at once.
 */
static __attribute__((cold, noinline)) void go_apart(struct tcp_ctx *c)
{
        for (struct tcp_ep *ep = c->eps; ep; ep = ep->next)
                tcp_interest(ep, 0);
        c->apart = true;
}

int tcp_poll(struct tp_ctx *ctx, struct tp_event *ev, int max)
{
        struct tcp_ctx *c = tcp_ctx_of(ctx);
        int n = 0;

        if (c->n_eps == 0 || c->n_eps > TCP_DIRECT || c->armed || (c->listeners && ++c->tick % TCP_LISTEN_TICK == 0)) {
                n = poll_many(c, ev, max);
        } else {
                struct tcp_ep *ep = c->eps;

                if (UNLIKELY(++c->directly == TCP_APART))
                        go_apart(c);
                /* Each poll begins with another endpoint, so that a talkative one cannot take all the room. */
                if (ep->next)
                        ep = c->first_second ? ep->next : ep;
                c->first_second = !c->first_second;
                n = ep_poll(ep, ev, max, true);
                ep = ep == c->eps ? ep->next : c->eps;
                if (ep && n < max)
                        n += ep_poll(ep, ev + n, max - n, true);
        }
        if (n)
                c->armed = false;
        return n;
}

int tcp_fd(struct tp_ctx *ctx)
{
        return tcp_ctx_of(ctx)->epfd;
}

int tcp_arm(struct tp_ctx *ctx)
{
        struct tcp_ctx *c = tcp_ctx_of(ctx);

        if (tcp_together(c) < 0)
                return -EAGAIN; /* the set has no room: who cannot be woken must poll */
        for (struct tcp_ep *ep = c->eps; ep; ep = ep->next) {
                if (ep->state == TCP_EP_DOWN)
                        continue;
                tcp_flush(ep);
                if (ep_has_work(ep) || tcp_interest(ep, ep_wants(ep)) < 0)
                        return -EAGAIN;
        }
        for (struct tcp_ep *ep = c->eps; ep; ep = ep->next)
                ep->base.n.naps++;
        c->armed = true;
        return 0;
}

void tcp_disarm(struct tp_ctx *ctx)
{
        struct tcp_ctx *c = tcp_ctx_of(ctx);

        c->armed = false;
        c->tick = TCP_LISTEN_TICK - 1; /* it may have been a listener that woke us */
}
