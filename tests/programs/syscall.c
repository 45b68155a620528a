/* Makes one system call by its number: `syscall native|i386|x32 NUMBER [ARG...]`.
 * ARG is a number, `buf` (a zeroed buffer), `str:TEXT` or `self` (this pid).
 * Says `call=ok` or `call=ERRNO`; where the call ends the program it says nothing. */
#include "probe.h"

static char buffer[4096];

static long argument(const char *text)
{
	if (!text)
		return 0;
	if (strcmp(text, "buf") == 0)
		return (long)buffer;
	if (strcmp(text, "self") == 0)
		return getpid();
	if (strncmp(text, "str:", 4) == 0)
		return (long)(text + 4);
	return (long)strtoull(text, NULL, 0);
}

static long call_native(long number, const long *a)
{
	long result = syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
	return result < 0 ? -errno : result;
}

#ifdef __x86_64__
/* The 32-bit entry, open to 64-bit programs too: filters that look at numbers only miss it. */
static long call_i386(long number, const long *a)
{
	long result;
	__asm__ volatile("int $0x80"
		: "=a"(result)
		: "a"(number), "b"(a[0]), "c"(a[1]), "d"(a[2]), "S"(a[3]), "D"(a[4])
		: "memory", "r8", "r9", "r10", "r11");
	return (int)result;
}
#endif

int main(int argc, char **argv)
{
	if (argc < 3)
		misuse("syscall native|i386|x32 NUMBER [ARG...]");
	long number = strtol(argv[2], NULL, 0), arguments[6] = { 0 }, result;
	for (int i = 0; i < 6 && i + 3 < argc; i++)
		arguments[i] = argument(argv[i + 3]);

	pid_t before = getpid();
	if (strcmp(argv[1], "native") == 0)
		result = call_native(number, arguments);
#ifdef __x86_64__
	else if (strcmp(argv[1], "i386") == 0)
		result = call_i386(number, arguments);
	else if (strcmp(argv[1], "x32") == 0)
		result = call_native(number | 0x40000000, arguments);
#endif
	else
		misuse("no such entry here: %s", argv[1]);

	if (getpid() != before) /* the new process of a clone that worked */
		_exit(0);
	errno = result < 0 && result >= -4095 ? -(int)result : 0;
	fact("call", "%s", errno ? error_name() : "ok");
	fact("result", "%ld", result);
	return 0;
}
