/* No model: the bytes come back. What is left is the cost of the framework itself. */
#include "workload.h"

#include <errno.h>
#include <string.h>

#include "err.h"

int echo_build(uint64_t payload_bytes, struct graph *out)
{
        memset(out, 0, sizeof(*out));
        /* Above, the size would turn into one of the negative numbers that stand for symbolic dimensions. */
        if (payload_bytes > INT64_MAX)
                return err_set(-EINVAL, "an echo of %llu bytes cannot be built", (unsigned long long)payload_bytes);
        struct graph_builder *b = gb_new("echo", 1, 1, 0, DT_U8);
        int64_t dims[] = {(int64_t)payload_bytes};
        unsigned x = gb_tensor(b, "input", DT_U8, RES_INPUT, 1, dims);
        unsigned y = gb_tensor(b, "output", DT_U8, RES_OUTPUT, 1, dims);

        gb_role(b, ROLE_INPUT, x);
        gb_role(b, ROLE_OUTPUT, y);
        gb_segment(b, SEG_BODY, PHASE_FORWARD);
        gb_node(b, OP_COPY, NULL, 2, (unsigned[]){y, x});
        return gb_finish(b, out);
}
