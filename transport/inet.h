/*
 * Names, addresses and stream sockets, for whatever meets over the Internet protocols: set-up only. Sockets are
 * non-blocking and closed on exec.
 */
#ifndef DJINN_TRANSPORT_INET_H
#define DJINN_TRANSPORT_INET_H

#include <netdb.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>

#include "transport.h"

/* While a connector waits it must let its own context's listeners get on, for it may be connecting to itself. */
struct inet_idle {
        int fd; /* readable when progress() has something to do; -1: none */
        void (*progress)(void *arg);
        void *arg;
};

/* The addresses of u's host and port; passive: to listen on, where the host "*" is all of ours. freeaddrinfo(3) is the
 * caller's. -EINVAL: no port; -EHOSTUNREACH or -errno: the name is not known; with a sentence. */
int inet_resolve(const char *url, const struct tp_url *u, bool passive, struct addrinfo **out);

/* No delay, and a host that goes without a word is noticed within about five seconds. Failures are ignored. */
void inet_tune(int fd);

/* A socket that listens at the first of u's addresses that allows it, or -errno with a sentence. tune: inet_tune or
 * more; accepted sockets inherit what it sets. */
int inet_listen(const char *url, const struct tp_url *u, int backlog, void (*tune)(int fd));
/* A connected socket, or -ECONNREFUSED, -ETIMEDOUT, ... with a sentence. */
int inet_connect(const char *url, const struct tp_url *u, void (*tune)(int fd), uint64_t deadline_ns,
                 const struct inet_idle *idle);
/* Waits for events (poll(2)) at fd: 0, -ETIMEDOUT, -errno; no sentence. idle: may be NULL. */
int inet_wait(int fd, short events, uint64_t deadline_ns, const struct inet_idle *idle);

/* "scheme://host:port" of an address; of the other end of a connected socket; of a listening one, as somebody on this
 * host may connect to it. */
void inet_url(const struct sockaddr *a, const char *scheme, char out[TP_URL_MAX]);
void inet_peer_url(int fd, const char *scheme, char out[TP_URL_MAX]);
void inet_listener_url(int fd, const char *scheme, char out[TP_URL_MAX]);

#endif
