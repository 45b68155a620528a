/* Leaves both streams full and in a mode of their own: `fill`. */
#include "probe.h"

int main(void)
{
	static char noise[65536];
	memset(noise, '.', sizeof noise);
	for (int fd = 1; fd <= 2; fd++) {
		if (fcntl(fd, F_SETFL, O_NONBLOCK))
			return 1;
		/* The last bytes, too, that there is room for. */
		for (size_t length = sizeof noise; length > 0; length /= 2)
			while (write(fd, noise, length) > 0)
				;
		if (errno != EAGAIN)
			return 2;
	}
	return 0;
}
