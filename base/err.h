/*
 * Errors: a function that can fail returns 0 or a count, or -errno, and leaves one sentence for the user in
 * thread-local storage. The first cause is kept; callers on the way up add where they were.
 *
 *   if (fd < 0)
 *           return err_set(-errno, "%s: cannot open: %s", path, strerror(errno));
 *   ...
 *   if ((rc = conf_load(path, &doc)) < 0)
 *           return err_trail(rc, "while reading the sweep's configuration");
 *
 * The sentence says what was wrong, where (file:line, field, or peer and phase), what was expected, what to do.
 * Never call these on a hot path: -EAGAIN ("full, poll first") and -ETIME are ordinary returns and set no sentence.
 */
#ifndef DJINN_BASE_ERR_H
#define DJINN_BASE_ERR_H

#define ERR_TEXT_MAX 1024

/* Replaces the calling thread's sentence; returns code (a negative errno). */
int err_set(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3), cold));

/* Appends "; <text>" to the sentence, if there is room; returns code. */
int err_trail(int code, const char *fmt, ...) __attribute__((format(printf, 2, 3), cold));

/* The calling thread's sentence, or "" when none was set; valid until this thread's next err_ call. */
const char *err_text(void);

/* The sentence if one was set, else strerror(-code): what a caller prints. */
const char *err_str(int code);

void err_clear(void);

#endif
