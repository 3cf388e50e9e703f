/* One-sided access: order, sizes, bounds, keys and their death, foreign memory, and everything mixed. */
#include "conform.h"

#include <sched.h>
#include <unistd.h>

#define GUARD      64u /* bytes around each target that nobody may touch */
#define GUARD_BYTE 0xa5

static struct tp_mem *guarded(struct side *s, size_t len)
{
        struct tp_mem *m;

        OK(tp_alloc(s->ep, len + 2 * GUARD, &m));
        CHECK(m->region.len == len + 2 * GUARD);
        CHECK(m->path && m->path[0]);
        CHECK((uintptr_t)m->region.addr % 4096 == 0);
        for (size_t i = 0; i < m->region.len; i += i + 4096 < m->region.len ? 4096 : 1)
                CHECK(((unsigned char *)m->region.addr)[i] == 0);
        memset(m->region.addr, GUARD_BYTE, GUARD);
        memset((char *)m->region.addr + GUARD + len, GUARD_BYTE, GUARD);
        return m;
}

static unsigned char *inner(const struct tp_mem *m)
{
        return (unsigned char *)m->region.addr + GUARD;
}

static bool guard_at(const unsigned char *p)
{
        for (unsigned i = 0; i < GUARD; i++)
                if (p[i] != GUARD_BYTE)
                        return false;
        return true;
}

static void check_guards(const struct tp_mem *m)
{
        CHECK(guard_at(m->region.addr));
        CHECK(guard_at((unsigned char *)m->region.addr + m->region.len - GUARD));
}

/* ---- order_write_then_send, write_imm_order: the event comes when the bytes are there ---- */

#define ORDER_ROUNDS 1500u
#define ORDER_BYTES  40000u

static size_t order_len(uint64_t round)
{
        return round % 8 == 7 ? ORDER_BYTES - round % 100 : prng_at(1, 2, round) % 600;
}

static void order_a_with(struct side *s, bool imm)
{
        unsigned char *src = malloc(ORDER_BYTES);
        struct tp_rmem *r;

        CHECK(src);
        take_key(s, &r);
        for (uint64_t i = 0; i < ORDER_ROUNDS; i++) {
                size_t len = order_len(i), off = prng_at(1, 3, i) % (ORDER_BYTES - len + 1);
                struct tp_event ev;

                pattern_fill(src, len, i);
                if (imm) {
                        do_write_imm(s, src, len, r, off, (uint32_t)off, 0);
                } else {
                        do_write(s, NULL, src, len, r, off, i % 2 ? TP_MORE : 0);
                        do_send(s, s->ep, &off, sizeof(off), 0);
                }
                settle(s);
                memset(src, 0xee, len); /* ours again: what travels must not be this */
                next_msg(s, &ev);
                release(s, &ev);
        }
        barrier(s);
        free(src);
}

static void order_b_with(struct side *s, bool imm)
{
        struct tp_mem *m = guarded(s, ORDER_BYTES);

        give_key(s, m, GUARD, ORDER_BYTES);
        for (uint64_t i = 0; i < ORDER_ROUNDS; i++) {
                size_t len = order_len(i), off;
                struct tp_event ev;

                next_event(s, &ev);
                if (imm) {
                        CHECK_EQ(ev.kind, TP_EV_IMM);
                        CHECK_EQ(ev.len, len);
                        off = ev.imm;
                } else {
                        CHECK_EQ(ev.kind, TP_EV_MSG);
                        memcpy(&off, ev.data, sizeof(off));
                        release(s, &ev);
                }
                CHECK(pattern_ok(inner(m) + off, len, i));
                do_send(s, s->ep, "ok", 2, 0);
                settle(s);
        }
        check_guards(m);
        barrier(s);
}

static void order_send_a(struct side *s)
{
        order_a_with(s, false);
}

static void order_send_b(struct side *s)
{
        order_b_with(s, false);
}

static void order_imm_a(struct side *s)
{
        order_a_with(s, true);
}

static void order_imm_b(struct side *s)
{
        order_b_with(s, true);
}

/* ---- imm_pipelined: many write_imm without waiting arrive once each, in order ---- */

#define IMM_ROUNDS 3000u

static void imm_pipelined_a(struct side *s)
{
        static unsigned char src[64];
        struct tp_rmem *r;

        take_key(s, &r);
        for (uint32_t i = 0; i < IMM_ROUNDS; i++)
                do_write_imm(s, src, i % 65, r, 0, i, i % 3 ? TP_MORE : 0);
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        barrier(s);
}

static void imm_pipelined_b(struct side *s)
{
        struct tp_mem *m = guarded(s, 64);
        struct tp_event ev;

        give_key(s, m, GUARD, 64);
        for (uint32_t i = 0; i < IMM_ROUNDS; i++) {
                next_event(s, &ev);
                CHECK_EQ(ev.kind, TP_EV_IMM);
                CHECK_EQ(ev.imm, i);
                CHECK_EQ(ev.len, i % 65);
        }
        next_msg(s, &ev);
        release(s, &ev);
        check_guards(m);
        barrier(s);
}

/* ---- read_after_write: a read sees the write posted just before it ---- */

static void read_after_write_a(struct side *s)
{
        unsigned char *src = malloc(ORDER_BYTES), *dst = malloc(ORDER_BYTES);
        struct tp_rmem *r;

        CHECK(src && dst);
        take_key(s, &r);
        for (uint64_t i = 0; i < 500; i++) {
                size_t len = order_len(i);

                pattern_fill(src, len, i);
                memset(dst, 0, len);
                do_write(s, NULL, src, len, r, 0, 0);
                do_read(s, NULL, dst, len, r, 0);
                settle(s);
                CHECK(pattern_ok(dst, len, i));
        }
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        barrier(s);
        free(src);
        free(dst);
}

static void until_end_b(struct side *s)
{
        struct tp_event ev;

        next_msg(s, &ev);
        CHECK_EQ(ev.len, 3);
        release(s, &ev);
}

static void read_after_write_b(struct side *s)
{
        struct tp_mem *m = guarded(s, ORDER_BYTES);

        give_key(s, m, GUARD, ORDER_BYTES);
        until_end_b(s);
        check_guards(m);
        barrier(s);
}

/* ---- bulk_write, bulk_read: 0 to 64 MiB ---- */

static const size_t bulk_sizes[] = {0, 1, 7, 63, 64, 65, 4095, 4096, (1u << 20) + 1, 3u << 20, 64u << 20};

static void bulk_write_a(struct side *s)
{
        for (size_t i = 0; i < ARRAY_LEN(bulk_sizes); i++) {
                size_t len = bulk_sizes[i];
                unsigned char *src = malloc(len + 1);
                struct tp_rmem *r;

                CHECK(src);
                pattern_fill(src, len, i);
                take_key(s, &r);
                CHECK_EQ(r->len, len);
                do_write(s, NULL, src, len, r, 0, 0);
                do_send(s, s->ep, "end", 3, 0);
                settle(s);
                barrier(s);
                tp_rmem_free(r);
                free(src);
        }
}

static void bulk_write_b(struct side *s)
{
        for (size_t i = 0; i < ARRAY_LEN(bulk_sizes); i++) {
                struct tp_mem *m = guarded(s, bulk_sizes[i]);

                give_key(s, m, GUARD, bulk_sizes[i]);
                until_end_b(s);
                CHECK(pattern_ok(inner(m), bulk_sizes[i], i));
                check_guards(m);
                barrier(s);
                tp_free(m);
        }
}

static void bulk_read_a(struct side *s)
{
        uint64_t total = 0;

        for (size_t i = 0; i < ARRAY_LEN(bulk_sizes); i++) {
                size_t len = bulk_sizes[i];
                struct tp_mem *m = guarded(s, len);
                struct tp_rmem *r;

                take_key(s, &r);
                do_read(s, m, inner(m), len, r, 0);
                settle(s);
                CHECK(pattern_ok(inner(m), len, i));
                check_guards(m);
                barrier(s);
                tp_rmem_free(r);
                tp_free(m);
                total += len;
        }
        CHECK(s->ep->n.bulk_bytes_rx >= total);
        CHECK_EQ(s->ep->n.bulk_ops, ARRAY_LEN(bulk_sizes));
}

static void bulk_read_b(struct side *s)
{
        for (size_t i = 0; i < ARRAY_LEN(bulk_sizes); i++) {
                struct tp_mem *m = guarded(s, bulk_sizes[i]);

                pattern_fill(inner(m), bulk_sizes[i], i);
                give_key(s, m, GUARD, bulk_sizes[i]);
                barrier(s);
                tp_free(m);
        }
}

/* ---- completion_once: mixed posts; the harness finds a completion that is doubled or invented, settle one lost ---- */

static void completion_once_a(struct side *s)
{
        static unsigned char src[8192], dst[64][8192];
        struct tp_rmem *r;

        take_key(s, &r);
        for (uint32_t i = 0; i < 6000; i++) {
                size_t len = prng_below(&s->prng, sizeof(src) + 1);
                unsigned more = prng_below(&s->prng, 2) ? TP_MORE : 0;

                switch (prng_below(&s->prng, 4)) {
                case 0:
                        do_send(s, s->ep, src, 4 + len % 4092, more); /* 3 bytes are the end */
                        break;
                case 1:
                        do_write(s, NULL, src, len, r, 0, more);
                        break;
                case 2:
                        do_write_imm(s, src, len, r, 0, i, more);
                        break;
                default:
                        if (s->open_n > 32)
                                settle(s);
                        do_read(s, NULL, dst[i % 64], len, r, 0);
                        break;
                }
        }
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        barrier(s);
        expect_quiet(s);
        CHECK_EQ(s->completions, s->next_cookie);
        barrier(s);
}

static void completion_once_b(struct side *s)
{
        struct tp_mem *m = guarded(s, 8192);
        struct tp_event ev;

        give_key(s, m, GUARD, 8192);
        do {
                next_event(s, &ev);
                if (ev.kind == TP_EV_MSG)
                        release(s, &ev);
                else
                        CHECK_EQ(ev.kind, TP_EV_IMM);
        } while (ev.kind != TP_EV_MSG || ev.len != 3);
        check_guards(m);
        barrier(s);
        expect_quiet(s);
        barrier(s);
}

/* ---- keys ---- */

/* Both sides: every write posted so far by either has arrived at the other. A completion alone does not say that. */
static void flush_writes(struct side *s)
{
        struct tp_event ev;

        do_send(s, s->ep, "f", 1, 0);
        settle(s);
        next_msg(s, &ev);
        CHECK_EQ(ev.len, 1);
        release(s, &ev);
        barrier(s);
}

static int import_now(struct side *s, const struct tp_key *key, struct tp_rmem **out)
{
        return tp_import_key(s->ep, key, clock_ns() + 200 * NS_PER_MS, out);
}

static void key_unknown_a(struct side *s)
{
        struct tp_rmem *r;
        struct tp_key key;
        struct tp_mem *m;

        memset(&key, 0, sizeof(key));
        CHECK_EQ(import_now(s, &key, &r), -EACCES);
        for (unsigned i = 0; i < 200; i++) {
                pattern_fill(&key, sizeof(key), i);
                CHECK_EQ(import_now(s, &key, &r), -EACCES);
        }
        CHECK(err_text()[0]);
        OK(tp_alloc(s->ep, 4096, &m)); /* a key of our own is not one of the peer's */
        OK(tp_export_key(m, 0, 4096, &key));
        CHECK_EQ(import_now(s, &key, &r), -EACCES);
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        barrier(s);
}

static void key_unknown_b(struct side *s)
{
        until_end_b(s);
        barrier(s);
}

/* A key of one connection opens nothing on another one. */
static void key_other_connection_a(struct side *s)
{
        struct tp_ep *second;
        struct tp_rmem *r;
        struct tp_key key;

        side_open(s);
        side_learn_url(s);
        side_connect(s, &s->ep);
        side_connect(s, &second);
        oob_recv(s, &key, sizeof(key));
        CHECK_EQ(tp_import_key(second, &key, clock_ns() + 200 * NS_PER_MS, &r), -EACCES);
        OK(tp_import_key(s->ep, &key, clock_ns() + PATIENCE_NS, &r));
        barrier(s);
}

static void key_other_connection_b(struct side *s)
{
        struct tp_ep *second;
        struct tp_mem *m;

        side_open(s);
        side_listen(s);
        side_accept(s, &s->ep);
        side_accept(s, &second);
        OK(tp_alloc(s->ep, 4096, &m));
        give_key(s, m, 0, 4096);
        barrier(s);
}

/*
 * One bit of a key is wrong. Where the importer does not find out, the owner must: the post is refused, or the
 * connection ends. Should the wrong bit only have made the window smaller, the post may be taken; what lies outside the
 * window stays untouched in every case, which b checks. Each bit gets a connection of its own, for it may end.
 */
static void use_tampered(struct side *s, struct tp_rmem *r)
{
        static unsigned char junk[8192];
        uint64_t cookie = begin_post(s);
        size_t len = r->len < sizeof(junk) ? r->len : sizeof(junk);
        struct tp_event ev;
        int rc;

        s->errors_allowed = true;
        while ((rc = tp_write(s->ep, NULL, junk, len, r, 0, 0, cookie)) == -EAGAIN)
                pump(s);
        if (rc < 0)
                return;
        end_post(s, cookie, rc);
        cookie = begin_post(s);
        while ((rc = tp_send(s->ep, "end", 3, 0, cookie)) == -EAGAIN)
                pump(s);
        if (rc >= 0)
                end_post(s, cookie, rc);
        settle(s);
        next_event(s, &ev); /* b's answer, or the end */
        if (ev.kind == TP_EV_MSG)
                release(s, &ev);
        else
                CHECK(ev.kind == TP_EV_DOWN && ev.status < 0);
}

static void key_tampered_a(struct side *s)
{
        side_open(s);
        side_learn_url(s);
        for (unsigned bit = 0; bit < 8 * TP_KEY_BYTES; bit++) {
                struct tp_rmem *r;
                struct tp_key key;
                int rc;

                side_connect(s, &s->ep);
                oob_recv(s, &key, sizeof(key));
                key.bytes[bit / 8] ^= (uint8_t)(1u << bit % 8);
                rc = import_now(s, &key, &r);
                if (rc == 0)
                        use_tampered(s, r);
                else
                        CHECK_EQ(rc, -EACCES);
                tp_ep_close(s->ep);
                barrier(s);
        }
}

static void key_tampered_b(struct side *s)
{
        side_open(s);
        side_listen(s);
        for (unsigned bit = 0; bit < 8 * TP_KEY_BYTES; bit++) {
                struct tp_event ev;
                struct tp_mem *m;

                side_accept(s, &s->ep);
                m = guarded(s, 4096);
                give_key(s, m, GUARD, 4096);
                next_event(s, &ev);
                if (ev.kind == TP_EV_MSG) {
                        release(s, &ev);
                        do_send(s, s->ep, "ok", 2, 0);
                        settle(s);
                        next_event(s, &ev);
                }
                CHECK_EQ(ev.kind, TP_EV_DOWN);
                check_guards(m);
                tp_ep_close(s->ep);
                barrier(s);
        }
}

/* An expired key: refused at the post, or by an error completion, or by the end of the connection. */
static void expect_refusal(struct side *s, int rc, uint64_t cookie)
{
        struct tp_event ev;

        if (rc < 0 && rc != -EAGAIN) {
                CHECK(rc == -ESTALE || rc == -EACCES);
                return;
        }
        if (rc == TP_COMPLETE) { /* the source is free; the refusal comes as the end of the connection */
                next_event(s, &ev);
                CHECK_EQ(ev.kind, TP_EV_DOWN);
                CHECK(ev.status == -ESTALE || ev.status == -EACCES);
                return;
        }
        s->errors_allowed = true;
        CHECK(end_post(s, cookie, rc));
        settle(s);
        if (s->last_status == 0) {
                next_event(s, &ev);
                CHECK_EQ(ev.kind, TP_EV_DOWN);
                CHECK(ev.status == -ESTALE || ev.status == -EACCES);
                return;
        }
        CHECK(s->last_status == -ESTALE || s->last_status == -EACCES || s->last_status == -ENOTCONN ||
              s->last_status == -ECONNRESET);
}

static void post_expired(struct side *s, struct tp_rmem *r)
{
        uint64_t cookie = begin_post(s), deadline = clock_ns() + PATIENCE_NS;
        int rc;

        while ((rc = tp_write(s->ep, NULL, "y", 1, r, 0, 0, cookie)) == -EAGAIN) {
                CHECK(clock_ns() < deadline);
                pump(s);
        }
        expect_refusal(s, rc, cookie);
}

static void key_expired_a(struct side *s)
{
        struct tp_rmem *r, *again;
        struct tp_key key;
        int rc;

        oob_recv(s, &key, sizeof(key));
        OK(tp_import_key(s->ep, &key, clock_ns() + PATIENCE_NS, &r));
        do_write(s, NULL, "x", 1, r, 0, 0);
        flush_writes(s); /* b frees after this */
        barrier(s);
        rc = import_now(s, &key, &again); /* some media find out only when it is used */
        CHECK(rc == 0 || rc == -ESTALE || rc == -EACCES);
        post_expired(s, r);
        barrier(s);
}

static void key_expired_b(struct side *s)
{
        struct tp_mem *m = guarded(s, 4096);

        give_key(s, m, GUARD, 4096);
        flush_writes(s);
        tp_free(m);
        barrier(s);
        barrier(s);
}

static void key_expired_foreign_b(struct side *s)
{
        unsigned char *own = malloc(4096);
        struct mem_region region = mem_host_region(own, 4096);
        struct tp_mem *m;

        CHECK(own);
        memset(own, 'o', 4096);
        OK(tp_reg(s->ep, &region, &m));
        give_key(s, m, 0, 4096);
        flush_writes(s);
        tp_free(m);
        memset(own, 'z', 4096);
        barrier(s);
        barrier(s);
        for (unsigned i = 0; i < 4096; i++)
                CHECK(own[i] == 'z');
        free(own);
}

static void bounds_a(struct side *s)
{
        static unsigned char buf[8192];
        static const struct {
                uint64_t off, len;
        } bad[] = {{0, 4097}, {4096, 1}, {4097, 0}, {1, 4096}, {UINT64_MAX, 1}, {UINT64_MAX - 10, 20}, {1ull << 63, 1}};
        struct tp_rmem *r;

        take_key(s, &r);
        CHECK_EQ(r->len, 4096);
        for (size_t i = 0; i < ARRAY_LEN(bad); i++) {
                REFUSED(tp_write(s->ep, NULL, buf, bad[i].len, r, bad[i].off, 0, 0), -ERANGE);
                REFUSED(tp_write_imm(s->ep, NULL, buf, bad[i].len, r, bad[i].off, 1, 0, 0), -ERANGE);
                REFUSED(tp_read(s->ep, NULL, buf, bad[i].len, r, bad[i].off, 0, 0), -ERANGE);
        }
        do_write(s, NULL, buf, 0, r, 4096, 0);
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        barrier(s);
}

static void bounds_b(struct side *s)
{
        struct tp_mem *m = guarded(s, 4096);
        struct tp_key key;

        CHECK_EQ(tp_export_key(m, m->region.len, 1, &key), -ERANGE);
        CHECK_EQ(tp_export_key(m, SIZE_MAX, 2, &key), -ERANGE);
        CHECK_EQ(tp_export_key(m, 1, m->region.len, &key), -ERANGE);
        give_key(s, m, GUARD, 4096);
        until_end_b(s);
        check_guards(m);
        barrier(s);
}

/* ---- foreign_memory: ordinary memory of the caller's, at both ends ---- */

static void foreign_a(struct side *s)
{
        const size_t len = (1u << 20) + 13;
        unsigned char *src = malloc(len), *dst = malloc(len);
        struct mem_region src_region = mem_host_region(src, len), dst_region = mem_host_region(dst, len);
        struct tp_mem *src_mem, *dst_mem;
        struct tp_rmem *r;

        CHECK(src && dst);
        OK(tp_reg(s->ep, &src_region, &src_mem));
        OK(tp_reg(s->ep, &dst_region, &dst_mem));
        CHECK(strcmp(src_mem->path, "copy") != 0 || src_mem->why[0]);
        take_key(s, &r);
        for (uint64_t i = 0; i < 12; i++) {
                size_t n = i < 11 ? (size_t)1 << (2 * i) : len;

                n = n < len ? n : len;
                pattern_fill(src, n, i);
                memset(dst, 0, n);
                if (i % 2) {
                        do_write_imm(s, src, n, r, 0, (uint32_t)n, 0);
                } else {
                        do_write(s, src_mem, src, n, r, 0, 0);
                        do_send(s, s->ep, &n, sizeof(n), 0);
                }
                do_read(s, dst_mem, dst, n, r, 0);
                settle(s);
                CHECK(pattern_ok(dst, n, i));
                barrier(s);
        }
        tp_free(src_mem);
        tp_free(dst_mem);
        free(src);
        free(dst);
}

static void foreign_b(struct side *s)
{
        const size_t len = (1u << 20) + 13;
        unsigned char *own = malloc(len + 2 * GUARD);
        struct mem_region region = mem_host_region(own, len + 2 * GUARD);
        struct tp_mem *m;

        CHECK(own);
        memset(own, GUARD_BYTE, len + 2 * GUARD);
        OK(tp_reg(s->ep, &region, &m));
        CHECK(m->region.addr == own);
        CHECK(strcmp(m->path, "copy") != 0 || m->why[0]);
        give_key(s, m, GUARD, len);
        for (uint64_t i = 0; i < 12; i++) {
                struct tp_event ev;
                size_t n;

                next_event(s, &ev);
                if (ev.kind == TP_EV_IMM) {
                        n = ev.imm;
                        CHECK_EQ(ev.len, n);
                } else {
                        CHECK_EQ(ev.kind, TP_EV_MSG);
                        memcpy(&n, ev.data, sizeof(n));
                        release(s, &ev);
                }
                CHECK(pattern_ok(own + GUARD, n, i));
                barrier(s);
        }
        CHECK(guard_at(own) && guard_at(own + GUARD + len));
        tp_free(m);
        free(own);
}

/* ---- mem_cycles: memory that comes and goes leaves nothing behind ---- */

#define MEM_CYCLES 400u

static void mem_cycles_side(struct side *s)
{
        int fds = 0, maps = 0;

        for (unsigned i = 0; i < MEM_CYCLES; i++) {
                struct tp_rmem *r;
                struct tp_mem *m;

                if (i == 50) {
                        barrier(s);
                        fds = count_fds();
                        maps = count_maps();
                }
                OK(tp_alloc(s->ep, 1 + prng_below(&s->prng, 100000), &m));
                give_key(s, m, 0, 1);
                take_key(s, &r);
                do_write(s, NULL, "k", 1, r, 0, 0);
                flush_writes(s);
                tp_rmem_free(r);
                tp_free(m);
        }
        barrier(s);
        expect_quiet(s);
        CHECK(count_fds() <= fds + 8);
        CHECK(count_maps() <= maps + 24);
        barrier(s);
}

/* ---- counters: what was posted is what is counted, on both sides ---- */

static void counters_a(struct side *s)
{
        static unsigned char buf[3000];
        struct tp_rmem *r;

        take_key(s, &r);
        for (unsigned i = 0; i < 100; i++) {
                do_write(s, NULL, buf, 3000, r, 0, 0);
                do_read(s, NULL, buf, 1000, r, 0);
                settle(s);
                do_send(s, s->ep, buf, 500, 0);
                settle(s);
        }
        do_send(s, s->ep, "end", 3, 0);
        settle(s);
        CHECK_EQ(s->ep->n.msgs_tx, 101);
        CHECK_EQ(s->ep->n.msg_bytes_tx, 50003);
        CHECK_EQ(s->ep->n.bulk_bytes_tx, 300000);
        CHECK_EQ(s->ep->n.bulk_bytes_rx, 100000);
        CHECK_EQ(s->ep->n.bulk_ops, 200);
        barrier(s);
}

static void counters_b(struct side *s)
{
        struct tp_mem *m = guarded(s, 3000);
        struct tp_event ev;

        give_key(s, m, GUARD, 3000);
        do {
                next_msg(s, &ev);
                release(s, &ev);
        } while (ev.len != 3);
        CHECK_EQ(s->ep->n.msgs_rx, 101);
        CHECK_EQ(s->ep->n.msg_bytes_rx, 50003);
        CHECK(s->ep->n.bulk_bytes_rx == 0 || s->ep->n.bulk_bytes_rx == 300000);
        CHECK_EQ(s->ep->n.bulk_bytes_tx, 0);
        barrier(s);
}

/* ---- random_mix: both sides write, read and send at random; a shadow knows what must be there ---- */

#define MIX_BYTES (1u << 18)
#define MIX_OPS   3000u

struct mix_msg {
        uint64_t seq, off, len, stamp;
        uint32_t region, end;
};

/* The owner's view of a message: these bytes were written before it was sent. */
static void mix_verify(struct side *s, const struct tp_event *ev, unsigned char *const mem[2], uint64_t expected)
{
        struct mix_msg m;

        CHECK(ev->kind == TP_EV_MSG && ev->len == sizeof(m));
        memcpy(&m, ev->data, sizeof(m));
        CHECK_EQ(m.seq, expected);
        if (!m.end)
                CHECK(pattern_ok(mem[m.region] + m.off, m.len, m.stamp));
        release(s, ev);
        if (!m.end)
                do_send(s, s->ep, "", 0, 0); /* the writer may reuse the range */
}

struct mix {
        struct side *s;
        unsigned char *own[2], *shadow[2], *buf;
        struct tp_rmem *r[2];
        uint64_t seen;
        bool answered, peer_ended;
};

static void mix_events(struct mix *x)
{
        struct side *s = x->s;

        if (pump(s) == 0)
                sched_yield();
        while (s->q_n > 0) {
                struct tp_event ev;

                next_event(s, &ev);
                if (ev.kind == TP_EV_MSG && ev.len == 0) {
                        x->answered = true;
                        release(s, &ev);
                        continue;
                }
                if (ev.kind == TP_EV_MSG && ev.len == sizeof(struct mix_msg))
                        x->peer_ended = ((const struct mix_msg *)ev.data)->end;
                mix_verify(s, &ev, x->own, x->seen++);
        }
}

static void mix_until_answered(struct mix *x)
{
        uint64_t deadline = clock_ns() + PATIENCE_NS;

        while (!x->answered) {
                mix_events(x);
                CHECK(clock_ns() < deadline);
        }
}

static void mix_write(struct mix *x, uint64_t seq, unsigned reg, size_t off, size_t len)
{
        struct mix_msg m = {.seq = seq, .off = off, .len = len, .stamp = seq, .region = reg};

        pattern_fill(x->shadow[reg] + off, len, seq);
        do_write(x->s, NULL, x->shadow[reg] + off, len, x->r[reg], off, TP_MORE);
        x->answered = false;
        do_send(x->s, x->s->ep, &m, sizeof(m), 0);
        settle(x->s);
        mix_until_answered(x);
}

static void mix_read(struct mix *x, unsigned reg, size_t off, size_t len)
{
        do_read(x->s, NULL, x->buf, len, x->r[reg], off);
        settle(x->s);
        CHECK(memcmp(x->buf, x->shadow[reg] + off, len) == 0);
}

static void mix_side(struct side *s)
{
        struct mix x = {.s = s, .buf = malloc(MIX_BYTES)};
        struct tp_mem *mem[2];
        struct mem_region foreign;
        struct mix_msg end = {.end = 1};
        uint64_t writes = 0;

        x.own[1] = calloc(1, MIX_BYTES);
        OK(tp_alloc(s->ep, MIX_BYTES, &mem[0]));
        x.own[0] = mem[0]->region.addr;
        foreign = mem_host_region(x.own[1], MIX_BYTES);
        OK(tp_reg(s->ep, &foreign, &mem[1]));
        for (int i = 0; i < 2; i++) {
                x.shadow[i] = calloc(1, MIX_BYTES);
                CHECK(x.shadow[i] && x.buf && x.own[i]);
                give_key(s, mem[i], 0, MIX_BYTES);
        }
        take_key(s, &x.r[0]);
        take_key(s, &x.r[1]);
        for (unsigned i = 0; i < MIX_OPS; i++) {
                unsigned reg = (unsigned)prng_below(&s->prng, 2);
                size_t len = prng_below(&s->prng, i % 50 ? 3000 : MIX_BYTES + 1);
                size_t off = prng_below(&s->prng, MIX_BYTES - len + 1);

                if (prng_below(&s->prng, 2))
                        mix_write(&x, writes++, reg, off, len);
                else
                        mix_read(&x, reg, off, len);
        }
        end.seq = writes;
        do_send(s, s->ep, &end, sizeof(end), 0);
        while (!x.peer_ended)
                mix_events(&x);
        settle(s);
        barrier(s);
        for (int i = 0; i < 2; i++) {
                free(x.shadow[i]);
                tp_free(mem[i]);
        }
        free(x.own[1]);
        free(x.buf);
}

/* ---- null ---- */

static void null_a(struct side *s)
{
        static unsigned char buf[4096];
        struct tp_listener *l;
        struct tp_event ev;
        struct tp_rmem *r;
        struct tp_key key;
        struct tp_mem *m;
        struct tp_ep *none;

        side_open(s);
        OK(tp_listen(s->ctx, s->url, &l));
        CHECK_EQ(tp_accept(l, &none), -EAGAIN);
        side_connect(s, &s->ep);
        OK(tp_alloc(s->ep, 4096, &m));
        OK(tp_export_key(m, 0, 4096, &key));
        OK(tp_import_key(s->ep, &key, 0, &r));
        CHECK_EQ(tp_send(s->ep, buf, 100, 0, 1), TP_COMPLETE);
        CHECK_EQ(tp_send(s->ep, buf, s->attr.msg_max + 1, 0, 1), -EMSGSIZE);
        CHECK_EQ(tp_write(s->ep, m, m->region.addr, 4096, r, 0, 0, 1), TP_COMPLETE);
        CHECK_EQ(tp_write(s->ep, NULL, buf, 4096, r, 1, 0, 1), -ERANGE);
        CHECK_EQ(tp_read(s->ep, NULL, buf, 4096, r, 0, 0, 1), TP_COMPLETE);
        CHECK_EQ(tp_poll(s->ctx, &ev, 1), 0);
        CHECK_EQ(tp_wait(s->ctx, &ev, 1, clock_ns() + 2 * NS_PER_MS), 0);
        CHECK_EQ(s->ep->n.msgs_tx, 1);
        CHECK_EQ(s->ep->n.bulk_bytes_tx, 4096);
}

const struct tcase bulk_cases[] = {
    {"order_write_then_send", order_send_a, order_send_b, 0},
    {"order_write_imm", order_imm_a, order_imm_b, 0},
    {"imm_pipelined", imm_pipelined_a, imm_pipelined_b, 0},
    {"read_after_write", read_after_write_a, read_after_write_b, 0},
    {"bulk_write", bulk_write_a, bulk_write_b, 0},
    {"bulk_read", bulk_read_a, bulk_read_b, 0},
    {"completion_once", completion_once_a, completion_once_b, 0},
    {"key_unknown", key_unknown_a, key_unknown_b, 0},
    {"key_other_connection", key_other_connection_a, key_other_connection_b, BARE},
    {"key_tampered", key_tampered_a, key_tampered_b, BARE},
    {"key_expired", key_expired_a, key_expired_b, 0},
    {"key_expired_foreign", key_expired_a, key_expired_foreign_b, 0},
    {"out_of_bounds", bounds_a, bounds_b, 0},
    {"foreign_memory", foreign_a, foreign_b, 0},
    {"mem_cycles", mem_cycles_side, mem_cycles_side, 0},
    {"counters", counters_a, counters_b, 0},
    {"random_mix", mix_side, mix_side, 0},
    {"null_subset", null_a, null_a, BARE | ONLY_NULL},
    {NULL, NULL, NULL, 0},
};
