/*
 * rdma, staged: device memory that the network device cannot reach, and a host buffer as long that stands for it.
 *
 * Ours. A write's bytes are copied out of device memory in pieces, several at a time, and each piece goes to the network
 * device as soon as it is there, so that copying and sending overlap; a read's pieces are copied into device memory as
 * they arrive. While a post waits for copies, later ones are refused with -EAGAIN, which keeps the order.
 *
 * The peer's. Each key has a host buffer of its own, apart from the one that the owner copies out through, so neither
 * overwrites what the other has not fetched. A write lands there and is followed by PLACE, which the owner obeys before it
 * delivers anything that came later. A read begins with REFRESH; when the owner answers FRESH, the buffer holds what the
 * device memory holds. Until then nothing else is posted, so no write can land in between and be overwritten.
 */
#include <endian.h>
#include <errno.h>
#include <string.h>

#include "clock.h"
#include "err.h"
#include "inside.h"
#include "rdma_private.h"

/* ---- copies out of device memory ---- */

static size_t mem_off(const struct rdma_mem *m, const uint8_t *bounce)
{
        return (size_t)(bounce - (const uint8_t *)m->reg.bounce);
}

static __attribute__((cold)) void copy_failed(struct rdma_ep *ep, const char *where, int rc)
{
        rdma_fail(ep, rc, "%s: a copy %s device memory failed: %s", ep->base.peer, where, strerror(-rc));
}

/* Takes off the list what is done; false when one failed. */
static bool copies_look(struct rdma_ep *ep)
{
        while (ep->n_copies > 0) {
                const struct rdma_copy *c = &ep->copies[0];
                const struct mem_region *r = &c->mem->base.region;
                int rc = r->ops->test(r, c->ticket);

                if (rc < 0)
                        copy_failed(ep, "out of", rc);
                if (rc <= 0)
                        return rc == 0;
                ep->cur.copied += c->len;
                memmove(ep->copies, ep->copies + 1, --ep->n_copies * sizeof(*ep->copies));
        }
        return true;
}

static bool copies_begin(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;
        const struct mem_region *r = &u->mem->base.region;
        uint64_t posted = u->len - u->left;
        size_t first = mem_off(u->mem, u->at - posted);

        while (ep->n_copies < RDMA_COPIES && u->asked < u->len) {
                struct rdma_copy c = {.mem = u->mem};
                size_t off = first + u->asked;
                int rc;

                c.len = (uint32_t)(u->len - u->asked < u->piece ? u->len - u->asked : u->piece);
                rc = r->ops->get_async(r, off, (uint8_t *)u->mem->reg.bounce + off, c.len, &c.ticket);
                if (rc == -EAGAIN)
                        return true;
                if (rc < 0) {
                        copy_failed(ep, "out of", rc);
                        return false;
                }
                ep->copies[ep->n_copies++] = c;
                u->asked += c.len;
                u->begun = true;
        }
        return true;
}

void rdma_stage_forget(struct rdma_ep *ep, const struct rdma_mem *m)
{
        unsigned kept = 0;

        for (unsigned i = 0; i < ep->n_copies; i++) {
                const struct rdma_copy *c = &ep->copies[i];

                if (c->mem != m) {
                        ep->copies[kept++] = *c;
                        continue;
                }
                while (m->base.region.ops->test(&m->base.region, c->ticket) == 0)
                        cpu_relax();
        }
        ep->n_copies = kept;
}

/* ---- posts ---- */

static struct rdma_stage_msg message(const struct rdma_cur *u, uint32_t serial)
{
        return (struct rdma_stage_msg){.addr = htole64(u->raddr + u->left - u->len),
                                       .len = htole64(u->len),
                                       .rkey = htole32(u->rkey),
                                       .imm = htole32(u->imm),
                                       .event = htole32(u->kind == RDMA_BULK_WRITE_IMM),
                                       .serial = htole32(serial)};
}

static void ask_refresh(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;
        struct rdma_stage_msg m = message(u, ep->refresh_serial + 1);

        if (!rdma_post_control(ep, RDMA_REFRESH, &m, sizeof(m), (struct rdma_rec){.what = "the begin of a read (SEND)"},
                               false))
                return;
        ep->refresh_serial++;
        u->refresh = RDMA_REFRESH_ASKED;
        u->begun = true;
}

bool rdma_stage_ready(struct rdma_ep *ep)
{
        struct rdma_cur *u = &ep->cur;

        if (u->refresh == RDMA_REFRESH_DUE)
                ask_refresh(ep);
        if (u->refresh != RDMA_REFRESH_NONE)
                return false;
        if (!u->mem || u->kind == RDMA_BULK_READ)
                return true;
        /* What an earlier post left behind, when it was given up, is not ours to count. */
        if (u->asked == 0 && ep->n_copies > 0) {
                rdma_stage_forget(ep, ep->copies[0].mem);
                u->copied = 0;
        }
        if (!copies_begin(ep) || !copies_look(ep) || !copies_begin(ep))
                return false;
        if (u->copied > u->len - u->left)
                return true;
        if (u->begun)
                rdma_todo(ep); /* no completion of the network device's tells of it */
        return false;
}

bool rdma_stage_place(struct rdma_ep *ep, struct rdma_rec rec)
{
        struct rdma_stage_msg m = message(&ep->cur, 0);

        return rdma_post_control(ep, RDMA_PLACE, &m, sizeof(m), rec, ep->cur.more);
}

void rdma_stage_landed(struct rdma_ep *ep, const struct rdma_rec *r)
{
        const struct rdma_mem *m = (const struct rdma_mem *)(const void *)r->bounce;
        int rc = tpi_region_put(&m->base.region, mem_off(m, r->dst), r->dst, r->len);

        if (rc < 0)
                copy_failed(ep, "into", rc);
}

/* ---- the owner's side ---- */

/* The bytes that a message names, or NULL: there is no such key (any more), or they are not all inside. */
static struct rdma_export *find_export(struct rdma_ep *ep, uint32_t rkey, uint64_t addr, uint64_t len, size_t *off)
{
        for (struct rdma_mem *m = ep->mems; m; m = m->next) {
                for (struct rdma_export *x = m->reg.bounce ? m->exports : NULL; x; x = x->next) {
                        if (x->reg.mr.rkey != rkey || !x->reg.bounce)
                                continue;
                        *off = (size_t)(addr - x->reg.iova);
                        return addr >= x->reg.iova && tpi_inside(*off, len, x->reg.len) ? x : NULL;
                }
        }
        return NULL;
}

static void count_copy(struct rdma_ep *ep, uint64_t len)
{
        ep->base.n.bytes_copied += len;
}

static int place(struct rdma_ep *ep, struct rdma_export *x, size_t off, uint64_t len)
{
        int rc = tpi_region_put(&x->region, off, (uint8_t *)x->reg.bounce + off, len);

        if (rc < 0)
                copy_failed(ep, "into", rc);
        count_copy(ep, len);
        return rc;
}

void rdma_stage_answer(struct rdma_ep *ep)
{
        struct rdma_stage_msg m = {.serial = htole32(ep->fresh_serial)};

        if (ep->credits == 0 || !rdma_post_control(ep, RDMA_FRESH, &m, sizeof(m),
                                                   (struct rdma_rec){.what = "the answer to a read (SEND)"}, false))
                return;
        ep->credits--;
        ep->tx_used++;
        ep->fresh_due = false;
}

static void refresh(struct rdma_ep *ep, struct rdma_export *x, size_t off, uint64_t len, uint32_t serial)
{
        int rc = tpi_region_get(&x->region, off, (uint8_t *)x->reg.bounce + off, len);

        if (rc < 0) {
                copy_failed(ep, "out of", rc);
                return;
        }
        count_copy(ep, len);
        ep->fresh_serial = serial;
        ep->fresh_due = true;
        rdma_todo(ep);
}

int rdma_stage_arrived(struct rdma_ep *ep, enum rdma_kind kind, const void *payload, struct tp_event *ev)
{
        struct rdma_stage_msg m;
        struct rdma_export *x;
        uint64_t len;
        size_t off;

        memcpy(&m, payload, sizeof(m));
        if (kind == RDMA_FRESH) {
                if (ep->cur.active && ep->cur.refresh == RDMA_REFRESH_ASKED &&
                    le32toh(m.serial) == ep->refresh_serial) {
                        ep->cur.refresh = RDMA_REFRESH_NONE;
                        rdma_todo(ep);
                }
                return 0;
        }
        len = le64toh(m.len);
        x = find_export(ep, le32toh(m.rkey), le64toh(m.addr), len, &off);
        if (!x) {
                rdma_fail(ep, -EACCES, "%s: %s staged memory by a key that has expired, or beyond what it opens",
                          ep->base.peer, kind == RDMA_PLACE ? "wrote to" : "reads");
                return 0;
        }
        if (kind == RDMA_REFRESH) {
                refresh(ep, x, off, len, le32toh(m.serial));
                return 0;
        }
        if (place(ep, x, off, len) < 0 || !m.event) {
                ep->base.n.bulk_bytes_rx += len;
                return 0;
        }
        ep->base.n.bulk_bytes_rx += len;
        *ev = (struct tp_event){.kind = TP_EV_IMM, .ep = &ep->base, .len = len, .imm = le32toh(m.imm)};
        return 1;
}
