/* What all test programs share: facts as `key=value` lines, errors by name. */
#ifndef PROBE_H
#define PROBE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* Prints one fact and flushes, so that it survives whatever comes next. */
__attribute__((format(printf, 2, 3), unused))
static void fact(const char *key, const char *format, ...)
{
	va_list args;
	va_start(args, format);
	printf("%s=", key);
	vprintf(format, args);
	putchar('\n');
	fflush(stdout);
	va_end(args);
}

/* The symbol of the current errno: EPERM, ENOSYS. */
__attribute__((unused))
static const char *error_name(void)
{
	const char *name = strerrorname_np(errno);
	return name ? name : "E?";
}

/* "ok" for a result of zero or more, else the errno's symbol. */
__attribute__((unused))
static const char *outcome(long result)
{
	return result >= 0 ? "ok" : error_name();
}

/* A usage error of the test itself: not to be mistaken for a finding. */
__attribute__((format(printf, 1, 2), noreturn, unused))
static void misuse(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fputs("misuse: ", stderr);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	_exit(64);
}

/* A number with an optional k, m or g. */
__attribute__((unused))
static unsigned long long number(const char *text)
{
	char *end;
	if (!text)
		misuse("a number is missing");
	unsigned long long value = strtoull(text, &end, 0);
	switch (*end) {
	case 'g': value <<= 10; /* fall through */
	case 'm': value <<= 10; /* fall through */
	case 'k': value <<= 10; end++;
	}
	if (*end)
		misuse("\"%s\" is not a number", text);
	return value;
}

__attribute__((unused))
static uint64_t monotonic_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Burns this much CPU time of this thread. */
__attribute__((unused))
static void burn_ms(uint64_t milliseconds)
{
	struct timespec used;
	do {
		for (volatile int i = 0; i < 20000; i++)
			;
		clock_gettime(CLOCK_THREAD_CPUTIME_ID, &used);
	} while ((uint64_t)used.tv_sec * 1000 + used.tv_nsec / 1000000 < milliseconds);
}

__attribute__((unused))
static void sleep_ms(uint64_t milliseconds)
{
	struct timespec left = { milliseconds / 1000, (milliseconds % 1000) * 1000000 };
	while (nanosleep(&left, &left) < 0 && errno == EINTR)
		;
}

/* By what it can be told that a jail has something of an earlier one: the cookie of a
 * network namespace and the random number of a file system in memory are never another's
 * before the host is booted anew. And when this process was made, in ms since then: where
 * the jail was built ahead, before it became the program. */
__attribute__((unused))
static void marks(void)
{
	unsigned long long cookie = 0, begun;
	socklen_t length = sizeof cookie;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (getsockopt(fd, SOL_SOCKET, 71 /* SO_NETNS_COOKIE */, &cookie, &length) == 0)
		fact("network", "%llu", cookie);
	close(fd);
	struct statvfs root;
	if (statvfs("/", &root) == 0)
		fact("root", "%lx", root.f_fsid);
	char text[1024] = "";
	fd = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
	ssize_t n = read(fd, text, sizeof text - 1);
	close(fd);
	/* Its 22nd field; the second is a name in parentheses. */
	char *name_end = n > 0 ? strrchr(text, ')') : NULL;
	if (name_end && sscanf(name_end + 1, "%*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s "
			       "%*s %*s %*s %*s %*s %*s %llu", &begun) == 1)
		fact("begun", "%llu", begun * 1000 / sysconf(_SC_CLK_TCK));
}

__attribute__((noreturn, unused))
static void forever(void)
{
	for (;;)
		pause();
}

#endif
