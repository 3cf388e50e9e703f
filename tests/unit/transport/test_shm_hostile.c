/*
 * A peer that shares memory with us and lies. Both ends of each connection are in this process and one context: `liar`
 * is an endpoint whose segment and socket the test writes into by hand, `victim` is the one that must survive, and a
 * second, honest connection must not notice.
 */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <fcntl.h>
#include <unistd.h>

#include "clock.h"
#include "err.h"
#include "shm_data.h"

#define PATIENCE (20 * NS_PER_S)

struct scene {
        char dir[64];
        char path[128];
        struct tp_ctx *ctx;
        struct tp_listener *l;
        struct shm_ep *liar, *victim;
        struct tp_ep *honest[2];
};

static void connect_pair(struct scene *s, struct tp_ep **a, struct tp_ep **b)
{
        assert_int_equal(tp_connect(s->ctx, s->l->url, clock_ns() + PATIENCE, a), 0);
        assert_int_equal(tp_accept(s->l, b), 0);
}

static int set_up(void **state)
{
        struct scene *s = calloc(1, sizeof(*s));
        struct tp_ep *a, *b;

        strcpy(s->dir, "/tmp/djinn-hostile-XXXXXX");
        assert_non_null(mkdtemp(s->dir));
        setenv("XDG_RUNTIME_DIR", s->dir, 1);
        snprintf(s->path, sizeof(s->path), "%s/djinnbench/hostile.sock", s->dir);
        assert_int_equal(tp_open("shm", NULL, &s->ctx), 0);
        assert_int_equal(tp_listen(s->ctx, "shm://hostile", &s->l), 0);
        connect_pair(s, &a, &b);
        s->liar = shm_ep_of(a);
        s->victim = shm_ep_of(b);
        connect_pair(s, &s->honest[0], &s->honest[1]);
        *state = s;
        return 0;
}

static int tear_down(void **state)
{
        struct scene *s = *state;
        char folder[128];

        tp_close(s->ctx);
        snprintf(folder, sizeof(folder), "%s/djinnbench", s->dir);
        rmdir(folder);
        rmdir(s->dir);
        free(s);
        return 0;
}

/* Polls until an event for ep comes; events of the liar are nobody's business. */
static struct tp_event event_of(struct scene *s, const struct tp_ep *ep)
{
        uint64_t deadline = clock_ns() + PATIENCE;
        struct tp_event ev;

        while (clock_ns() < deadline)
                if (tp_poll(s->ctx, &ev, 1) == 1 && ev.ep == ep)
                        return ev;
        fail_msg("nothing came");
        return ev;
}

static void check_honest(struct scene *s)
{
        struct tp_event ev;

        assert_int_equal(tp_send(s->honest[0], "still here", 10, 0, 1), TP_COMPLETE);
        ev = event_of(s, s->honest[1]);
        assert_int_equal(ev.kind, TP_EV_MSG);
        assert_memory_equal(ev.data, "still here", 10);
        tp_release(ev.ep, ev.cookie);
}

static void expect_killed(struct scene *s)
{
        struct tp_event ev = event_of(s, &s->victim->base);

        assert_int_equal(ev.kind, TP_EV_DOWN);
        assert_int_equal(ev.status, -EPROTO);
        assert_true(err_text()[0] != '\0');
        assert_int_equal(tp_send(&s->victim->base, "x", 1, 0, 1), -ENOTCONN);
        check_honest(s);
}

/* Publishes a slot of the liar's making. */
static void publish_lie(struct scene *s, uint32_t kind, uint32_t len, uint32_t where, const void *data, size_t data_len)
{
        struct shm_ep *e = s->liar;
        struct shm_slot *slot = &e->tx_slots[e->tx_next % SHM_SLOTS];

        slot->kind = (uint16_t)kind;
        slot->len = len;
        slot->where = where;
        if (data_len > 0)
                memcpy(slot->data, data, data_len);
        atomic_store(&slot->seq, (uint32_t)++e->tx_next);
}

static void connect_anew(struct scene *s)
{
        struct tp_ep *a, *b;

        tp_ep_close(&s->victim->base);
        tp_ep_close(&s->liar->base);
        connect_pair(s, &a, &b);
        s->liar = shm_ep_of(a);
        s->victim = shm_ep_of(b);
}

static void test_bad_slots(void **state)
{
        static const struct {
                uint32_t kind, len, where;
        } lies[] = {
            {0, 0, 0},
            {99, 10, 0},
            {UINT32_MAX, UINT32_MAX, UINT32_MAX},
            {SHM_MSG_INLINE, SHM_INLINE + 1, 0},
            {SHM_MSG_INLINE, UINT32_MAX, 0},
            {SHM_MSG_BYTES, SHM_MSG_MAX + 1, 0},
            {SHM_MSG_BYTES, 1, SHM_BYTES},
            {SHM_MSG_BYTES, 2, SHM_BYTES - 1},
            {SHM_MSG_BYTES, 1, UINT32_MAX},
            {SHM_COPY_WRITE, SHM_MSG_MAX + 1, 0},
            {SHM_COPY_WRITE, 1, SHM_BYTES},
        };
        struct scene *s = *state;

        for (size_t i = 0; i < ARRAY_LEN(lies); i++) {
                publish_lie(s, lies[i].kind, lies[i].len, lies[i].where, NULL, 0);
                expect_killed(s);
                connect_anew(s);
        }
}

/* The peer's short count of what we released wraps around, also while nothing comes back and it grows old. */
static void test_many_messages(void **state)
{
        struct scene *s = *state;
        struct tp_event ev;

        for (uint32_t i = 0; i < 140000; i++) {
                bool back = i % 70000 > 69000 && i % 2;
                struct tp_ep *from = s->honest[back], *to = s->honest[!back];

                assert_int_equal(tp_send(from, &i, sizeof(i), 0, 1), TP_COMPLETE);
                ev = event_of(s, to);
                assert_memory_equal(ev.data, &i, sizeof(i));
                tp_release(to, ev.cookie);
        }
}

static void test_head_ahead(void **state)
{
        struct scene *s = *state;
        int rc = TP_COMPLETE;

        atomic_store(&s->victim->peer->head, 1000000);
        for (unsigned i = 0; i <= SHM_SLOTS && rc == TP_COMPLETE; i++)
                rc = tp_send(&s->victim->base, "x", 1, 0, i);
        assert_int_equal(rc, -EAGAIN);
        expect_killed(s);
}

static void test_head_backwards(void **state)
{
        struct scene *s = *state;
        struct tp_event ev;
        int rc = TP_COMPLETE;

        for (unsigned i = 0; i < 2 * SHM_SLOTS; i++) { /* an honest lap first */
                assert_int_equal(tp_send(&s->victim->base, "x", 1, 0, i), TP_COMPLETE);
                ev = event_of(s, &s->liar->base);
                tp_release(ev.ep, ev.cookie);
        }
        atomic_store(&s->liar->me->head, 3);
        for (unsigned i = 0; i <= 2 * SHM_SLOTS && rc == TP_COMPLETE; i++)
                rc = tp_send(&s->victim->base, "x", 1, 0, i);
        assert_int_equal(rc, -EAGAIN);
        expect_killed(s);
}

/* More messages than the ring holds while the victim keeps its loans: the loans' books must not be overrun. */
static void test_overrun(void **state)
{
        struct scene *s = *state;
        struct tp_event ev[SHM_SLOTS];

        for (unsigned i = 0; i < SHM_SLOTS; i++) {
                publish_lie(s, SHM_MSG_INLINE, 4, 0, &i, sizeof(i));
                ev[i] = event_of(s, &s->victim->base);
                assert_int_equal(ev[i].kind, TP_EV_MSG);
        }
        publish_lie(s, SHM_MSG_INLINE, 4, 0, "over", 4);
        expect_killed(s);
        for (unsigned i = 0; i < SHM_SLOTS; i++)
                tp_release(&s->victim->base, ev[i].cookie);
}

/* Copied operations are refused one by one, and nothing outside the region changes. */
static void test_copy_lies(void **state)
{
        struct scene *s = *state;
        unsigned char own[64];
        struct mem_region region = mem_host_region(own, 32);
        struct tp_mem *m, *closed;
        struct shm_copy good, lies[9];
        struct tp_key key;

        memset(own, 'o', sizeof(own));
        assert_int_equal(tp_reg(&s->victim->base, &region, &m), 0);
        assert_int_equal(tp_export_key(m, 0, 8, &key), 0);
        assert_int_equal(tp_export_key(m, 4, 12, &key), 0);
        assert_int_equal(tp_reg(&s->victim->base, &region, &closed), 0);
        good = (struct shm_copy){.tag = 1,
                                 .epoch = container_of(m, struct shm_mem, base)->epoch,
                                 .region = container_of(m, struct shm_mem, base)->region,
                                 .flags = SHM_COPY_LAST | SHM_COPY_IMM};
        for (size_t i = 0; i < ARRAY_LEN(lies); i++) {
                lies[i] = good;
                lies[i].tag = 100 + i;
        }
        lies[0].region = SHM_REGIONS;
        lies[1].region = UINT32_MAX;
        lies[2].region = good.region + 2;
        lies[3].epoch += 2;
        lies[4].off = 32;
        lies[5].off = UINT64_MAX - 1;
        lies[6].off = 9; /* inside the region, and in its last byte outside what was exported */
        lies[7].off = 24;
        lies[8].region = container_of(closed, struct shm_mem, base)->region;
        lies[8].epoch = container_of(closed, struct shm_mem, base)->epoch;
        memset(s->liar->tx_bytes, 'L', 64);
        for (size_t i = 0; i < ARRAY_LEN(lies); i++) {
                struct tp_event ev;

                publish_lie(s, i % 2 ? SHM_COPY_READ : SHM_COPY_WRITE, 8, 0, &lies[i], sizeof(lies[i]));
                publish_lie(s, SHM_COPY_WRITE, 8, 0, &lies[i], sizeof(lies[i]));
                for (unsigned k = 0; k < 4; k++)
                        assert_int_equal(tp_poll(s->ctx, &ev, 1), 0);
                assert_true(atomic_load(&s->victim->me->reply_tag) == lies[i].tag);
                assert_true(atomic_load(&s->victim->me->reply_status) < 0);
        }
        for (size_t i = 0; i < sizeof(own); i++)
                assert_int_equal(own[i], 'o');
        publish_lie(s, SHM_COPY_WRITE, 8, 0, &good, sizeof(good));
        assert_int_equal(event_of(s, &s->victim->base).kind, TP_EV_IMM);
        assert_int_equal(own[7], 'L');
        assert_int_equal(own[8], 'o');
        check_honest(s);
}

/* A control socket that the peer does not read holds nobody up for long, and only once. */
static void test_unread_socket(void **state)
{
        struct shm_ctl wake = {.magic = SHM_MAGIC, .version = SHM_VERSION, .type = SHM_CTL_WAKE};
        struct scene *s = *state;
        uint64_t start = clock_ns();
        struct tp_event ev;
        struct tp_mem *m;
        struct tp_key key;

        while (send(s->victim->watch.fd, &wake, sizeof(wake), MSG_DONTWAIT) > 0)
                ;
        assert_int_equal(errno, EAGAIN);
        assert_int_equal(tp_alloc(&s->victim->base, 4096, &m), 0);
        assert_int_equal(tp_export_key(m, 0, 4096, &key), -ETIMEDOUT);
        assert_non_null(strstr(err_text(), "does not read its control socket"));
        assert_true(tp_export_key(m, 0, 4096, &key) < 0);
        assert_true(clock_ns() - start < NS_PER_S);
        ev = event_of(s, &s->victim->base);
        assert_int_equal(ev.kind, TP_EV_DOWN);
        assert_int_equal(ev.status, -ETIMEDOUT);
        check_honest(s);
}

/* A victim that reads from the liar's memory gets an answer that is no errno. */
static void test_reply_lies(void **state)
{
        struct scene *s = *state;
        unsigned char own[64], dst[64];
        struct mem_region region = mem_host_region(own, sizeof(own));
        struct tp_rmem *r;
        struct tp_key key;
        struct tp_mem *m;
        struct tp_event ev;

        assert_int_equal(tp_reg(&s->liar->base, &region, &m), 0);
        assert_int_equal(tp_export_key(m, 0, sizeof(own), &key), 0);
        assert_int_equal(tp_import_key(&s->victim->base, &key, 0, &r), 0);
        assert_int_equal(tp_read(&s->victim->base, NULL, dst, sizeof(dst), r, 0, 0, 77), TP_POSTED);
        atomic_store(&s->liar->me->reply_status, 5);
        atomic_store(&s->liar->me->reply_tag, s->victim->op.tag);
        /* the victim is polled before the liar's honest half can answer, or after: both ends in one DONE */
        s->liar->slow |= SHM_SLOW_DEAD;
        ev = event_of(s, &s->victim->base);
        assert_int_equal(ev.kind, TP_EV_DONE);
        assert_int_equal(ev.cookie, 77);
        assert_int_equal(ev.status, -EPROTO);
        check_honest(s);
}

/* Everything at once, thousands of times: whatever is in the segment, the victim neither crashes nor hangs. */
static void test_scribble(void **state)
{
        struct scene *s = *state;
        struct prng p;

        prng_seed(&p, 4);
        for (unsigned round = 0; round < 300; round++) {
                struct shm_segment *seg = s->liar->seg;
                struct tp_ep *a, *b;
                struct tp_event ev;
                bool down = false;

                for (unsigned i = 0; i < 200 && !down; i++) {
                        struct shm_slot *slot = &seg->slots[0][s->victim->rx_next % SHM_SLOTS];

                        slot->kind = (uint16_t)prng_below(&p, 7);
                        slot->acked = (uint16_t)prng_u64(&p);
                        slot->len = (uint32_t)(prng_u64(&p) >> prng_below(&p, 64));
                        slot->where = (uint32_t)(prng_u64(&p) >> prng_below(&p, 64));
                        for (unsigned k = 0; k < SHM_INLINE; k++)
                                slot->data[k] = (unsigned char)(prng_below(&p, 3) ? 0 : prng_u64(&p));
                        if (prng_below(&p, 10) == 0)
                                atomic_store(&seg->side[0].head, prng_u64(&p) >> prng_below(&p, 64));
                        atomic_store(&seg->side[0].armed, (uint32_t)prng_below(&p, 4));
                        atomic_store(&slot->seq, (uint32_t)(s->victim->rx_next + 1));
                        tp_send(&s->victim->base, slot->data, prng_below(&p, 100), 0, 1);
                        if (tp_poll(s->ctx, &ev, 1) == 1 && ev.ep == &s->victim->base) {
                                down = ev.kind == TP_EV_DOWN;
                                if (ev.kind == TP_EV_MSG)
                                        tp_release(ev.ep, ev.cookie);
                        }
                }
                tp_ep_close(&s->victim->base);
                tp_ep_close(&s->liar->base);
                connect_pair(s, &a, &b);
                s->liar = shm_ep_of(a);
                s->victim = shm_ep_of(b);
        }
        check_honest(s);
}

/* No liar here: an old loan that is still held must not take the byte area from those that follow it. */
static void test_held_loan_leaves_room(void **state)
{
        static unsigned char big[SHM_MSG_MAX];
        struct scene *s = *state;
        struct tp_ep *tx = s->honest[0], *rx = s->honest[1];

        for (unsigned round = 0; round < 200; round++) {
                struct tp_event held, ev[8];

                assert_int_equal(tp_send(tx, big, 300 + 13 * round, 0, 1), TP_COMPLETE);
                held = event_of(s, rx);
                for (unsigned i = 0; i < ARRAY_LEN(ev); i++) {
                        assert_int_equal(tp_send(rx, "ack", 3, 0, 1), TP_COMPLETE);
                        ev[i] = event_of(s, tx);
                        tp_release(tx, ev[i].cookie);
                        assert_int_equal(tp_send(tx, big, sizeof(big), 0, 1), TP_COMPLETE);
                        ev[i] = event_of(s, rx);
                }
                for (unsigned i = 0; i < ARRAY_LEN(ev); i++)
                        tp_release(rx, ev[i].cookie);
                tp_release(rx, held.cookie);
        }
}

/* ---- the socket ---- */

static int count_fds(void)
{
        DIR *d = opendir("/proc/self/fd");
        int n = 0;

        while (readdir(d))
                n++;
        closedir(d);
        return n;
}

static void say(int sock, struct shm_ctl c, int fd)
{
        union {
                struct cmsghdr align;
                char buf[CMSG_SPACE(sizeof(int))];
        } u = {0};
        struct iovec iov = {&c, sizeof(c)};
        struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};

        c.magic = SHM_MAGIC;
        c.version = SHM_VERSION;
        if (fd >= 0) {
                m.msg_control = u.buf;
                m.msg_controllen = sizeof(u.buf);
                *CMSG_FIRSTHDR(&m) = (struct cmsghdr){
                    .cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
                memcpy(CMSG_DATA(CMSG_FIRSTHDR(&m)), &fd, sizeof(fd));
        }
        assert_true(sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) > 0);
}

static void test_garbage_record(void **state)
{
        struct scene *s = *state;

        assert_int_equal(send(s->liar->watch.fd, "garbage", 7, 0), 7);
        expect_killed(s);
}

static void test_mem_out_of_range(void **state)
{
        struct scene *s = *state;
        int fd = memfd_create("x", 0);

        say(s->liar->watch.fd, (struct shm_ctl){.type = SHM_CTL_MEM, .region = SHM_REGIONS, .len = 1}, fd);
        close(fd);
        expect_killed(s);
}

static void test_mem_without_descriptor(void **state)
{
        struct scene *s = *state;

        say(s->liar->watch.fd, (struct shm_ctl){.type = SHM_CTL_MEM, .region = 1, .len = 1}, -1);
        expect_killed(s);
}

/* Descriptors that nobody asked for are bounded, and gone after the end. */
static void test_descriptor_flood(void **state)
{
        struct scene *s = *state;
        int before = count_fds(), fd = memfd_create("x", 0);
        struct tp_event ev;

        for (uint32_t i = 0; i < 4 * SHM_PENDING_FDS; i++) {
                say(s->liar->watch.fd, (struct shm_ctl){.type = SHM_CTL_MEM, .region = i % SHM_REGIONS, .epoch = i},
                    fd);
                shm_attend(shm_ctx_of(s->ctx));
                assert_true(count_fds() <= before + 1 + (int)SHM_PENDING_FDS);
                if (s->victim->slow)
                        break;
        }
        close(fd);
        ev = event_of(s, &s->victim->base);
        assert_int_equal(ev.kind, TP_EV_DOWN);
        tp_ep_close(&s->victim->base);
        tp_ep_close(&s->liar->base);
        assert_true(count_fds() <= before - 2);
        check_honest(s);
}

/* A key whose memory could shrink under the importer's feet, is shorter than it says, or has no pages. */
static void try_memory(struct scene *s, uint32_t region, int fd, uint64_t len)
{
        struct tpi_key k = {.magic = SHM_KEY_MAGIC, .side = 0, .slot = region, .epoch = 1, .len = len};
        struct tp_rmem *r;
        struct tp_key key;

        assert_true(fd >= 0);
        atomic_store(&s->liar->me->epoch[region], 1);
        say(s->liar->watch.fd, (struct shm_ctl){.type = SHM_CTL_MEM, .region = region, .epoch = 1, .len = len}, fd);
        close(fd);
        tpi_key_seal(&key, &k, s->liar->secret);
        assert_int_equal(tp_import_key(&s->victim->base, &key, clock_ns() + PATIENCE, &r), -EACCES);
        check_honest(s);
}

static int memory(size_t size, bool backed, int seals)
{
        int fd = memfd_create("x", MFD_ALLOW_SEALING);

        assert_int_equal(ftruncate(fd, (off_t)size), 0);
        if (backed)
                assert_int_equal(fallocate(fd, 0, 0, (off_t)size), 0);
        if (seals)
                assert_int_equal(fcntl(fd, F_ADD_SEALS, seals), 0);
        return fd;
}

static void test_bad_memory(void **state)
{
        struct scene *s = *state;

        try_memory(s, 0, memory(8192, true, 0), 8192);
        try_memory(s, 1, memory(4096, true, F_SEAL_SHRINK | F_SEAL_GROW), 8192);
        try_memory(s, 2, memory(1u << 20, false, F_SEAL_SHRINK | F_SEAL_GROW), 1u << 20);
        try_memory(s, 3, open("/dev/zero", O_RDWR), 4096);
}

static void test_mem_key_lies(void **state)
{
        struct scene *s = *state;
        struct tpi_key k = {.magic = SHM_KEY_MAGIC, .side = 0, .slot = SHM_REGIONS + 5, .epoch = 1, .len = 1};
        struct tp_rmem *r;
        struct tp_key key;
        uint64_t start;

        tpi_key_seal(&key, &k, s->liar->secret);
        assert_int_equal(tp_import_key(&s->victim->base, &key, 0, &r), -EACCES);
        k.slot = 7;
        tpi_key_seal(&key, &k, s->liar->secret);
        assert_int_equal(tp_import_key(&s->victim->base, &key, 0, &r), -ESTALE);
        atomic_store(&s->liar->me->epoch[7], 1); /* announced and never handed over */
        start = clock_ns();
        assert_int_equal(tp_import_key(&s->victim->base, &key, clock_ns() + PATIENCE, &r), -EACCES);
        assert_true(clock_ns() - start < NS_PER_S); /* nobody waits for what was to be here already */
        check_honest(s);
}

static int raw_connect(const struct scene *s)
{
        struct sockaddr_un sa = {.sun_family = AF_UNIX};
        int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

        assert_true(strlen(s->path) < sizeof(sa.sun_path));
        memcpy(sa.sun_path, s->path, strlen(s->path) + 1);
        assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof(sa)), 0);
        return fd;
}

/* Whoever says something else than HELLO is shown out. */
static void test_bad_hello(void **state)
{
        static const struct shm_ctl hellos[] = {
            {.type = SHM_CTL_WAKE},
            {.type = SHM_CTL_HELLO, .len = 4096},
            {.type = SHM_CTL_WELCOME, .len = sizeof(struct shm_segment)},
        };
        struct scene *s = *state;
        struct tp_ep *none;
        char c;

        for (size_t i = 0; i <= ARRAY_LEN(hellos); i++) {
                int fd = raw_connect(s);

                if (i < ARRAY_LEN(hellos))
                        say(fd, hellos[i], -1);
                else
                        assert_int_equal(send(fd, "GET / HTTP/1.1\r\n\r\n", 18, 0), 18);
                shm_attend(shm_ctx_of(s->ctx)); /* takes it in */
                shm_attend(shm_ctx_of(s->ctx)); /* hears it */
                assert_int_equal(recv(fd, &c, 1, MSG_DONTWAIT), 0);
                close(fd);
        }
        assert_int_equal(tp_accept(s->l, &none), -EAGAIN);
        check_honest(s);
}

/* Those who connect and say nothing are bounded in number, and do not keep others out for ever. */
static void test_silent_connectors(void **state)
{
        struct scene *s = *state;
        int before = count_fds(), fds[100];

        for (size_t i = 0; i < ARRAY_LEN(fds); i++) {
                fds[i] = raw_connect(s);
                shm_attend(shm_ctx_of(s->ctx));
        }
        assert_true(count_fds() <= before + (int)ARRAY_LEN(fds) + 64);
        for (size_t i = 0; i < ARRAY_LEN(fds); i++)
                close(fds[i]);
        shm_attend(shm_ctx_of(s->ctx));
        shm_attend(shm_ctx_of(s->ctx));
        assert_int_equal(count_fds(), before);
        check_honest(s);
}

static void test_modes(void **state)
{
        struct scene *s = *state;
        struct tp_listener *l;
        struct tp_ep *ep;
        char folder[128];
        struct stat st;

        assert_int_equal(stat(s->path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
        snprintf(folder, sizeof(folder), "%s/djinnbench", s->dir);
        assert_int_equal(stat(folder, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0700);
        assert_int_equal(chmod(folder, 0777), 0); /* others could put their socket there */
        assert_int_equal(tp_listen(s->ctx, "shm://other", &l), -EPERM);
        assert_int_equal(tp_connect(s->ctx, "shm://hostile", clock_ns() + NS_PER_S, &ep), -EPERM);
        assert_true(err_text()[0] != '\0');
        assert_int_equal(chmod(folder, 0700), 0);
        assert_int_equal(tp_listen(s->ctx, "shm://../evil", &l), -EINVAL);
        assert_int_equal(tp_listen(s->ctx, "shm://.evil", &l), -EINVAL);
        assert_int_equal(tp_listen(s->ctx, "shm://", &l), -EINVAL);
}

static void make_dead_socket(const struct scene *s, const char *name, struct sockaddr_un *sa)
{
        int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);

        *sa = (struct sockaddr_un){.sun_family = AF_UNIX};
        snprintf(sa->sun_path, sizeof(sa->sun_path), "%s/djinnbench/%s.sock", s->dir, name);
        assert_int_equal(bind(fd, (struct sockaddr *)sa, sizeof(*sa)), 0);
        close(fd);
}

/* What a killed server leaves behind keeps nobody from listening again, and is gone when anybody listens. */
static void test_stale_socket(void **state)
{
        struct scene *s = *state;
        struct sockaddr_un same, other;
        struct tp_listener *l;

        make_dead_socket(s, "dead", &same);
        make_dead_socket(s, "other", &other);
        assert_int_equal(tp_listen(s->ctx, "shm://dead", &l), 0);
        assert_int_equal(access(other.sun_path, F_OK), -1);
        assert_int_equal(access(s->path, F_OK), 0);
        assert_int_equal(tp_listen(s->ctx, "shm://dead", &l), -EADDRINUSE);
        assert_int_equal(access(same.sun_path, F_OK), 0);
        tp_listener_close(l);
        assert_int_equal(access(same.sun_path, F_OK), -1);
        check_honest(s);
}

#define CASE(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
        const struct CMUnitTest tests[] = {
            CASE(test_many_messages),
            CASE(test_bad_slots),
            CASE(test_head_ahead),
            CASE(test_head_backwards),
            CASE(test_overrun),
            CASE(test_copy_lies),
            CASE(test_reply_lies),
            CASE(test_scribble),
            CASE(test_garbage_record),
            CASE(test_mem_out_of_range),
            CASE(test_mem_without_descriptor),
            CASE(test_descriptor_flood),
            CASE(test_bad_memory),
            CASE(test_mem_key_lies),
            CASE(test_bad_hello),
            CASE(test_silent_connectors),
            CASE(test_modes),
            CASE(test_stale_socket),
            CASE(test_held_loan_leaves_room),
            CASE(test_unread_socket),
        };

        return cmocka_run_group_tests(tests, NULL, NULL);
}
