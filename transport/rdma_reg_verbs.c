/*
 * Registration by passport on libibverbs, and the probe write: a queue pair of the endpoint's own protection domain is
 * connected with itself and READs a pattern from host memory into the region. (A read, because what it needs of the
 * region is local write access, which every registration grants; the device writes to the region either way.)
 */
#include "rdma_reg.h"

#include <errno.h>
#include <infiniband/verbs.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "check.h"
#include "clock.h"

#define PROBE_DEADLINE_NS (1 * NS_PER_S)
#define PROBE_MAX_BYTES   4096u

static int mr_made(struct ibv_mr *mr, struct rdma_mr *out)
{
        if (!mr)
                return errno > 0 ? -errno : -EOPNOTSUPP;
        *out = (struct rdma_mr){mr, mr->lkey, mr->rkey};
        return 0;
}

static int verbs_reg_mr(struct rdma_reg_dev *d, void *addr, size_t len, struct rdma_mr *out)
{
        errno = 0;
        return mr_made(ibv_reg_mr(d->pd, addr, len, (unsigned)d->access), out);
}

static int verbs_reg_dmabuf(struct rdma_reg_dev *d, uint64_t offset, size_t len, uint64_t iova, int fd,
                            struct rdma_mr *out)
{
        errno = 0;
        return mr_made(ibv_reg_dmabuf_mr(d->pd, offset, len, iova, fd, d->access), out);
}

static int verbs_dereg(struct rdma_reg_dev *d, struct rdma_mr *mr)
{
        return -ibv_dereg_mr(mr->handle);
}

static size_t verbs_page(struct rdma_reg_dev *d)
{
        return (size_t)sysconf(_SC_PAGESIZE);
}

/* No descriptor is -1: where dmabuf is known at all, that is what is complained of. */
static int verbs_probe_dmabuf(struct rdma_reg_dev *d)
{
        struct rdma_mr mr;
        int rc = verbs_reg_dmabuf(d, 0, verbs_page(d), 0, -1, &mr);

        if (rc == 0)
                verbs_dereg(d, &mr);
        return rc == -EBADF ? 0 : rc;
}

static const char *verbs_peermem(struct rdma_reg_dev *d)
{
        static const char *const modules[] = {
            "/sys/module/nvidia_peermem",
            "/sys/module/nv_peer_mem",
            "/sys/kernel/mm/memory_peers/nv_mem",
        };

        for (size_t i = 0; i < ARRAY_LEN(modules); i++)
                if (access(modules[i], F_OK) == 0)
                        return strrchr(modules[i], '/') + 1;
        return NULL;
}

static void verbs_close_fd(struct rdma_reg_dev *d, int fd)
{
        close(fd);
}

static void *verbs_bounce_alloc(struct rdma_reg_dev *d, size_t len)
{
        void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

        if (p == MAP_FAILED)
                return NULL;
        madvise(p, len, MADV_DONTFORK);
        return p;
}

static void verbs_bounce_free(struct rdma_reg_dev *d, void *bounce, size_t len)
{
        munmap(bounce, len);
}

/* ---- the probe ---- */

struct probe {
        struct ibv_cq *cq;
        struct ibv_qp *qp;
        struct ibv_mr *mr;
        uint64_t *words;
        enum ibv_mtu mtu;
        uint16_t lid;
};

static void probe_end(struct probe *b)
{
        if (b->qp)
                ibv_destroy_qp(b->qp);
        if (b->cq)
                ibv_destroy_cq(b->cq);
        if (b->mr)
                ibv_dereg_mr(b->mr);
        if (b->words)
                munmap(b->words, PROBE_MAX_BYTES);
}

static int probe_make(struct rdma_reg_dev *d, const struct rdma_reg_port *port, struct probe *b)
{
        struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_RC, .sq_sig_all = 1};
        struct ibv_port_attr attr;

        init.cap = (struct ibv_qp_cap){.max_send_wr = 1, .max_recv_wr = 1, .max_send_sge = 1, .max_recv_sge = 1};
        if (ibv_query_port(d->pd->context, port->port, &attr))
                return -ENODEV;
        b->mtu = attr.active_mtu;
        b->lid = attr.lid;
        b->words = verbs_bounce_alloc(d, PROBE_MAX_BYTES);
        if (!b->words)
                return -ENOMEM;
        b->mr = ibv_reg_mr(d->pd, b->words, PROBE_MAX_BYTES, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ);
        b->cq = b->mr ? ibv_create_cq(d->pd->context, 1, NULL, NULL, 0) : NULL;
        init.send_cq = init.recv_cq = b->cq;
        b->qp = b->cq ? ibv_create_qp(d->pd, &init) : NULL;
        return b->qp ? 0 : -errno;
}

static int probe_connect(struct rdma_reg_dev *d, const struct rdma_reg_port *port, struct probe *b)
{
        struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT, .port_num = port->port};
        int rc;

        a.qp_access_flags = IBV_ACCESS_REMOTE_READ;
        rc = ibv_modify_qp(b->qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
        if (rc)
                return -rc;
        a = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTR, .path_mtu = b->mtu, .dest_qp_num = b->qp->qp_num};
        a.max_dest_rd_atomic = 1;
        a.min_rnr_timer = 12;
        a.ah_attr.port_num = port->port;
        a.ah_attr.dlid = b->lid;
        if (port->gid_index >= 0) {
                a.ah_attr.is_global = 1;
                a.ah_attr.grh.sgid_index = (uint8_t)port->gid_index;
                a.ah_attr.grh.hop_limit = 1;
                if (ibv_query_gid(d->pd->context, port->port, port->gid_index, &a.ah_attr.grh.dgid))
                        return -ENODEV;
        }
        rc = ibv_modify_qp(b->qp, &a,
                           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                               IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
        if (rc)
                return -rc;
        a.qp_state = IBV_QPS_RTS;
        a.timeout = 14;
        a.retry_cnt = 3;
        a.max_rd_atomic = 1;
        return -ibv_modify_qp(b->qp, &a,
                              IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                  IBV_QP_MAX_QP_RD_ATOMIC);
}

static int probe_read(struct probe *b, const struct rdma_mr *mr, uint64_t iova, size_t len, uint64_t deadline_ns)
{
        struct ibv_sge to = {.addr = iova, .length = (uint32_t)len, .lkey = mr->lkey};
        struct ibv_send_wr wr = {.sg_list = &to, .num_sge = 1, .opcode = IBV_WR_RDMA_READ}, *bad;
        struct ibv_wc wc;
        int rc;

        wr.wr.rdma.remote_addr = (uintptr_t)b->words;
        wr.wr.rdma.rkey = b->mr->rkey;
        rc = ibv_post_send(b->qp, &wr, &bad);
        if (rc)
                return -rc;
        deadline_ns += clock_ns();
        while ((rc = ibv_poll_cq(b->cq, 1, &wc)) == 0)
                if (clock_ns() > deadline_ns)
                        return -ETIMEDOUT;
        return rc < 0 || wc.status != IBV_WC_SUCCESS ? -EIO : 0;
}

static int verbs_probe_write(struct rdma_reg_dev *d, const struct rdma_mr *mr, uint64_t iova, size_t len, uint64_t seed)
{
        const struct rdma_reg_port *port = d->user;
        struct probe b = {0};
        int rc;

        if (!port)
                return -ENOTSUP;
        if (len > PROBE_MAX_BYTES)
                return -EINVAL;
        rc = probe_make(d, port, &b);
        if (rc == 0)
                rc = probe_connect(d, port, &b);
        if (rc == 0) {
                for (size_t i = 0; i < len / sizeof(*b.words); i++)
                        b.words[i] = mem_probe_word(seed, i);
                rc = probe_read(&b, mr, iova, len, port->deadline_ns ? port->deadline_ns : PROBE_DEADLINE_NS);
        }
        probe_end(&b);
        return rc;
}

const struct rdma_reg_provider rdma_reg_verbs = {
    .reg_mr = verbs_reg_mr,
    .reg_dmabuf = verbs_reg_dmabuf,
    .dereg = verbs_dereg,
    .probe_dmabuf = verbs_probe_dmabuf,
    .peermem = verbs_peermem,
    .close_fd = verbs_close_fd,
    .bounce_alloc = verbs_bounce_alloc,
    .bounce_free = verbs_bounce_free,
    .probe_write = verbs_probe_write,
    .page = verbs_page,
};
