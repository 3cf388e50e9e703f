/* What every unit test includes. */
#ifndef DJINN_TESTS_UNIT_H
#define DJINN_TESTS_UNIT_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include <cmocka.h>

#include "err.h"

/* The sentence that was left must hold every word that a user needs. */
#define assert_sentence(part)                                                   \
        do {                                                                    \
                if (!strstr(err_text(), (part)))                                \
                        fail_msg("expected \"%s\" in: %s", (part), err_text()); \
        } while (0)

#define assert_close(a, b, eps)                                                        \
        do {                                                                           \
                double close_a = (a), close_b = (b);                                   \
                if (!(fabs(close_a - close_b) <= (eps)))                               \
                        fail_msg("%s is %.17g, expected %.17g", #a, close_a, close_b); \
        } while (0)

#endif
