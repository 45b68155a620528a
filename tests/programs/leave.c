/* Leaves things behind, and looks for them: `leave all KEY`, `leave look KEY`.
 * `hold` does as `all` and stays; `marks` does nothing and stays for KEY ms; `watch` takes
 * all of its user's inotify instances, says how many, and stays for KEY ms; `clean` takes
 * away what outlives the process where there is no jail. All but `clean` tell first by
 * what their jail is known. KEY is a number, so that tests don't meet. */
#include "probe.h"
#include <stddef.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/un.h>

static char path[64];
static struct sockaddr_un name = { .sun_family = AF_UNIX };
static socklen_t name_length;

static int lock(const char *what)
{
	int fd = open(what, O_RDONLY);
	return fd < 0 || flock(fd, LOCK_EX | LOCK_NB) ? -1 : fd;
}

/* Sends descriptors into a socket's own queue: the kernel keeps them until it finds out. */
static int into_itself(const int *fds, int count)
{
	int pair[2];
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		return -1;
	char space[CMSG_SPACE(8 * sizeof(int))] = { 0 };
	struct iovec byte = { .iov_base = "x", .iov_len = 1 };
	struct msghdr message = { .msg_iov = &byte, .msg_iovlen = 1, .msg_control = space };
	message.msg_controllen = CMSG_SPACE((count + 2) * sizeof(int));
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN((count + 2) * sizeof(int));
	memcpy(CMSG_DATA(rights), pair, sizeof pair);
	memcpy(CMSG_DATA(rights) + sizeof pair, fds, count * sizeof(int));
	return sendmsg(pair[0], &message, MSG_NOSIGNAL) < 0 ? -1 : 0;
}

static void leave(key_t key)
{
	fact("shm", "%s", outcome(shmget(key, 4096, IPC_CREAT | 0600)));
	fact("file", "%s", outcome(open(path, O_WRONLY | O_CREAT, 0600)));
	int fds[3] = { lock("/dev/null"), lock("/"), socket(AF_UNIX, SOCK_STREAM, 0) };
	fact("lock.null", "%s", outcome(fds[0]));
	fact("lock.root", "%s", outcome(fds[1]));
	int bound = bind(fds[2], (struct sockaddr *)&name, name_length);
	fact("abstract", "%s", outcome(bound ? bound : listen(fds[2], 8)));
	/* What somebody else has locked can't be sent. */
	int had[3], count = 0;
	for (int i = 0; i < 3; i++)
		if (fds[i] >= 0)
			had[count++] = fds[i];
	fact("itself", "%s", outcome(into_itself(had, count)));
}

static void look(key_t key)
{
	fact("shm", "%s", outcome(shmget(key, 1, 0)));
	fact("file", "%s", outcome(access(path, F_OK)));
	fact("lock.null", "%s", outcome(lock("/dev/null")));
	fact("lock.root", "%s", outcome(lock("/")));
	/* Nobody accepts: a full queue is an answer as well. */
	int client = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0);
	fact("abstract", "%s", outcome(connect(client, (struct sockaddr *)&name, name_length)));
}

static void watch(void)
{
	int count = 0;
	while (inotify_init1(IN_CLOEXEC) >= 0)
		count++;
	fact("instances", "%d %s", count, error_name());
}

static void stay(unsigned ms)
{
	fact("from", "%llu", (unsigned long long)monotonic_ms());
	sleep_ms(ms);
	fact("until", "%llu", (unsigned long long)monotonic_ms());
}

int main(int argc, char **argv)
{
	if (argc != 3)
		misuse("leave all|hold|look|marks|watch|clean KEY");
	key_t key = atoi(argv[2]);
	snprintf(path, sizeof path, "/tmp/leave-%d", key);
	int length = snprintf(name.sun_path + 1, sizeof name.sun_path - 1, "leave-%d", key);
	name_length = offsetof(struct sockaddr_un, sun_path) + 1 + length;
	if (strcmp(argv[1], "clean"))
		marks();
	if (!strcmp(argv[1], "look"))
		look(key);
	else if (!strcmp(argv[1], "marks"))
		stay(key);
	else if (!strcmp(argv[1], "watch")) {
		watch();
		usleep(key * 1000);
	} else if (!strcmp(argv[1], "clean")) {
		shmctl(shmget(key, 1, 0), IPC_RMID, NULL);
		unlink(path);
	} else {
		leave(key);
		while (!strcmp(argv[1], "hold"))
			pause();
	}
	return 0;
}
