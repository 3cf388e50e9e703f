/* What tcp.c and raw_tcp.c ask of the kernel for a socket, so that one is measured against the other on equal terms. */
#ifndef DJINN_TRANSPORT_TCP_SOCKET_H
#define DJINN_TRANSPORT_TCP_SOCKET_H

#include "transport.h"

/* No delay, keepalive, large buffers where the host allows them. For sockets that will listen or connect, before they
 * do (the window's scale is fixed in the handshake); accepted ones inherit it. Failures only cost speed and are ignored. */
void tcp_socket_tune(int fd);
/* For sockets that are connected. Between two ends on one host there is no congestion to control, and what the system
 * does against it elsewhere (pacing, models of the path) only costs time: the plainest control is chosen. */
void tcp_socket_connected(int fd);
/* Fills in what the attributes say of the device below, as far as it can be told. Cold. */
void tcp_socket_describe(int fd, struct tp_attr *out);

#endif
