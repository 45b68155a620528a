/* Does what its arguments say, one after the other: `act print hello exit 3`.
 * The plainest program there is; every verdict that a well-meant program can
 * get is had from it. Ends with status 0 where the arguments run out. */
#include "probe.h"
#include <dirent.h>
#include <sys/prctl.h>

extern char **environ;

static char **rest;

static char *next(void)
{
	if (!*rest)
		misuse("an argument is missing");
	return *rest++;
}

static void put(int fd, const char *bytes, size_t length)
{
	while (length > 0) {
		ssize_t n = write(fd, bytes, length);
		if (n < 0 && errno != EINTR)
			_exit(74);
		if (n > 0) {
			bytes += n;
			length -= n;
		}
	}
}

static void copy_stdin(int show)
{
	static char buffer[65536];
	unsigned long long total = 0;
	ssize_t n;
	while ((n = read(0, buffer, sizeof buffer)) > 0) {
		total += n;
		if (show)
			put(1, buffer, n);
	}
	if (!show)
		fact("stdin.bytes", "%llu", total);
}

static void put_hex(const char *digits)
{
	unsigned byte;
	for (; sscanf(digits, "%2x", &byte) == 1 && digits[0] && digits[1]; digits += 2)
		put(1, (char[]){ byte }, 1);
}

static void list_directory(const char *path)
{
	DIR *directory = opendir(path);
	if (!directory) {
		fact(path, "%s", error_name());
		return;
	}
	for (struct dirent *entry; (entry = readdir(directory));)
		if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
			fact(path, "%s", entry->d_name);
	closedir(directory);
}

static void show_file(const char *path)
{
	char buffer[4096];
	ssize_t n;
	int fd = open(path, O_RDONLY);
	if (fd < 0) {
		fact(path, "%s", error_name());
		return;
	}
	while ((n = read(fd, buffer, sizeof buffer)) > 0)
		put(1, buffer, n);
	close(fd);
}

static void write_file(const char *path, const char *content)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_APPEND, 0600);
	fact(path, "%s", outcome(fd < 0 ? fd : write(fd, content, strlen(content))));
	if (fd >= 0)
		close(fd);
}

static int is(const char *verb, const char *name)
{
	return strcmp(verb, name) == 0;
}

static void perform(const char *verb)
{
	const char *text;
	if (is(verb, "print")) {
		text = next();
		put(1, text, strlen(text));
	} else if (is(verb, "err")) {
		text = next();
		put(2, text, strlen(text));
	} else if (is(verb, "hex"))
		put_hex(next());
	else if (is(verb, "exit"))
		_exit((int)number(next()));
	else if (is(verb, "raise")) {
		int signal_number = (int)number(next());
		signal(signal_number, SIG_DFL);
		raise(signal_number);
	} else if (is(verb, "sleep"))
		sleep_ms(number(next()));
	else if (is(verb, "burn"))
		burn_ms(number(next()));
	else if (is(verb, "clock")) /* one clock for all runs of this host */
		fact("clock", "%llu", (unsigned long long)monotonic_ms());
	else if (is(verb, "forever"))
		forever();
	else if (is(verb, "name")) /* as seen in /proc/PID/comm by the test */
		prctl(PR_SET_NAME, next());
	else if (is(verb, "stdin"))
		copy_stdin(1);
	else if (is(verb, "count"))
		copy_stdin(0);
	else if (is(verb, "env"))
		for (char **entry = environ; *entry; entry++)
			fact("env", "%s", *entry);
	else if (is(verb, "ls"))
		list_directory(next());
	else if (is(verb, "cat"))
		show_file(next());
	else if (is(verb, "write")) {
		text = next();
		write_file(text, next());
	} else if (is(verb, "exec")) {
		text = next();
		execv(text, (char *[]){ (char *)text, NULL });
		_exit(127);
	} else if (is(verb, "close"))
		close((int)number(next()));
	else
		misuse("no such verb: %s", verb);
}

int main(int argc, char **argv)
{
	(void)argc;
	rest = argv + 1;
	while (*rest)
		perform(next());
	return 0;
}
