/* Shows how it was called: argv, environment, descriptors' kinds, all of stdin in hex. */
#include "probe.h"

extern char **environ;

int main(int argc, char **argv)
{
	for (int i = 0; i < argc; i++)
		fact("argv", "%s", argv[i]);
	for (char **entry = environ; *entry; entry++)
		fact("env", "%s", *entry);

	fputs("stdin=", stdout);
	unsigned char buffer[4096];
	ssize_t n;
	while ((n = read(0, buffer, sizeof buffer)) > 0)
		for (ssize_t i = 0; i < n; i++)
			printf("%02x", buffer[i]);
	printf("\nstdin.end=%s\n", outcome(n));
	return 0;
}
