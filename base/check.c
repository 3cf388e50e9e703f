#include "check.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void bug_at(const char *file, int line, const char *what)
{
        char text[512];
        int n = snprintf(text, sizeof(text), "djinnbench: bug: %s:%d: %s\n", file, line, what);
        ssize_t wrote = write(STDERR_FILENO, text, n < (int)sizeof(text) ? (size_t)n : sizeof(text) - 1);

        (void)wrote;
        abort();
}
