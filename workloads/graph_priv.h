/* What graph.c and bind.c share. */
#ifndef DJINN_WORKLOADS_GRAPH_PRIV_H
#define DJINN_WORKLOADS_GRAPH_PRIV_H

#include "graph.h"

/* The instruction of one node with dimensions for `rows`; data of present operands is a made-up address. */
void graph_inst(const struct graph *g, unsigned node, uint32_t rows, struct op_inst *out);

#endif
