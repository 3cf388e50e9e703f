#include "err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char sentence[ERR_TEXT_MAX];
static _Thread_local char strerror_text[128];

int err_set(int code, const char *fmt, ...)
{
        char fresh[ERR_TEXT_MAX] = ""; /* the arguments may point into the old sentence */
        va_list ap;

        va_start(ap, fmt);
        vsnprintf(fresh, sizeof(fresh), fmt, ap);
        va_end(ap);
        memcpy(sentence, fresh, sizeof(fresh));
        return code;
}

int err_trail(int code, const char *fmt, ...)
{
        char more[ERR_TEXT_MAX] = "";
        size_t used = strlen(sentence);
        va_list ap;

        va_start(ap, fmt);
        vsnprintf(more, sizeof(more), fmt, ap);
        va_end(ap);
        size_t len = strlen(more);

        /* A callee may have failed without a sentence: then the trail is all there is. */
        if (used == 0) {
                memcpy(sentence, more, sizeof(more));
        } else if (used + 2 + len < sizeof(sentence)) {
                memcpy(sentence + used, "; ", 2);
                memcpy(sentence + used + 2, more, len + 1);
        }
        return code;
}

const char *err_text(void)
{
        return sentence;
}

const char *err_str(int code)
{
        if (sentence[0])
                return sentence;
        return strerror_r(code < 0 ? -code : code, strerror_text, sizeof(strerror_text));
}

void err_clear(void)
{
        sentence[0] = '\0';
}
