/*
 * How two ends meet whose medium cannot greet by itself: over a TCP socket of their own they exchange what each needs
 * to know (addresses of queue pairs, sizes, a secret). The socket stays open as long as the connection: its end is how a
 * peer's death is noticed although nothing is outstanding, and a last word travels on it.
 *
 *      connector                               acceptor
 *      connect, HELLO          ---------->     hello(): makes its half of the connection
 *                              <----------     ANSWER, or REFUSE and the reason
 *      its half is complete
 *      READY                   ---------->     ready(): only now somebody hears of the connection
 *
 * A frame is a header of 32 bytes and at most BOOT_PAYLOAD_MAX bytes, little endian. A half-made connection has a
 * deadline and their number is bounded; when it is full, the oldest makes room, so that strangers who say nothing cannot
 * keep others out.
 */
#ifndef DJINN_TRANSPORT_BOOTSTRAP_H
#define DJINN_TRANSPORT_BOOTSTRAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "inet.h"
#include "transport.h"

#define BOOT_PAYLOAD_MAX 512u
#define BOOT_HEAD_BYTES  32u

enum boot_kind {
        BOOT_HELLO = 1,
        BOOT_ANSWER,
        BOOT_REFUSE, /* status; payload: the sentence */
        BOOT_READY,
        BOOT_BYE,  /* an orderly end; count: what the backend needs to know that everything has arrived */
        BOOT_FAIL, /* status: why the sender gave the connection up */
        BOOT_KINDS
};

struct boot_frame {
        enum boot_kind kind;
        int status; /* 0 or -errno */
        uint64_t count;
        uint32_t len;
        uint8_t payload[BOOT_PAYLOAD_MAX];
};

/* Collects one frame from a socket, never a byte beyond it. Zeroed before the first use. */
struct boot_reader {
        size_t have;
        uint8_t bytes[BOOT_HEAD_BYTES + BOOT_PAYLOAD_MAX];
};

/* protocol: four letters that name the backend, so that an rdma client at another server's port is told so. */
#define BOOT_PROTOCOL(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)

/* Never blocks. 0, or -EPIPE: the socket takes nothing more (no sentence). */
int boot_send(int fd, uint32_t protocol, enum boot_kind kind, int status, uint64_t count, const void *payload,
              size_t len);
/* Never blocks. 1: a frame; 0: more is to come; -EPIPE: the peer closed; -errno of the socket; -EPROTO: what came is no
 * frame of this protocol and version (sentence set; peer is for it). */
int boot_receive(int fd, uint32_t protocol, struct boot_reader *r, const char *peer, struct boot_frame *out);

/* ---- connecting ---- */

/* HELLO there, ANSWER back. -errno with a sentence, the peer's own where it refused. */
int boot_exchange(int fd, const char *url, uint32_t protocol, const void *hello, size_t len, uint64_t deadline_ns,
                  const struct inet_idle *idle, struct boot_frame *answer);

/* ---- listening ---- */

struct boot_listener;

struct boot_serve { /* what the backend does */
        uint32_t protocol;
        const char *scheme;
        /* A HELLO came: makes what the connection needs (*made) and fills in the answer (room: BOOT_PAYLOAD_MAX). 0, or
         * -errno with a sentence that is sent to the peer. */
        int (*hello)(void *arg, int fd, const struct boot_frame *hello, void *answer, size_t *answer_len, void **made);
        /* READY came: the backend owns fd and made from now on. */
        void (*ready)(void *arg, int fd, void *made);
        /* The connection came to nothing. fd is closed by the bootstrap. */
        void (*drop)(void *arg, void *made);
        void *arg;
};

/* Listens at u->host (or "*") and u->port. -errno with a sentence. */
int boot_listen(const char *url, const struct tp_url *u, const struct boot_serve *serve, struct boot_listener **out);
void boot_listener_close(struct boot_listener *l);
/* Readable when boot_listener_progress has something to do. */
int boot_listener_fd(const struct boot_listener *l);
/* Never blocks. more: whether new connections may be taken. */
void boot_listener_progress(struct boot_listener *l, bool more);
/* "scheme://host:port" as one may connect to it. */
void boot_listener_url(const struct boot_listener *l, char out[TP_URL_MAX]);

#endif
