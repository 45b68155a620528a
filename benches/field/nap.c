/* Sleeps until it is killed. Its name tells from outside that it came so far. */
#include <sys/prctl.h>
#include <unistd.h>

int main(void) {
  if (prctl(PR_SET_NAME, "bench-nap")) return 1;
  for (;;) pause();
}
