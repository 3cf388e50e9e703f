/*
 * Diagnostics for people, on stderr; results go to stdout and never through here. Never on a hot path.
 * Each line is one write(2), so lines of client and server processes do not tear.
 */
#ifndef DJINN_BASE_LOG_H
#define DJINN_BASE_LOG_H

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

/* Lines above `level` are dropped. Default LOG_INFO; DJINN_LOG=error|warn|info|debug at first use. */
void log_set_level(enum log_level level);

void log_line(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3), cold));

#define log_error(...) log_line(LOG_ERROR, __VA_ARGS__)
#define log_warn(...)  log_line(LOG_WARN, __VA_ARGS__)
#define log_info(...)  log_line(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_line(LOG_DEBUG, __VA_ARGS__)

#endif
