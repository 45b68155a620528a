/* A service to talk with: it takes connections at the socket that it inherited, and at one
 * of its own, and does what each says: a word, an argument, the end of a line. It answers
 * with the outcome in a line, and closes the connection. */
#include "probe.h"
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77 /* since Linux 6.5 */
#endif

static const char *path;
static int own = -1;

/* What it finds when it is started: its descriptors, what it was told, and who it is. */
static void tell_facts(void)
{
	for (int fd = 0; fd < 4096; fd++)
		if (fcntl(fd, F_GETFD) >= 0)
			fact("fd", "%d", fd);
	for (const char **name = (const char *[]){ "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID",
						    "GRPC_UNIX_SOCKET", "PATH", NULL }; *name; name++)
		fact(*name, "%s", getenv(*name) ? getenv(*name) : "-");
	int listens = 0, kind = 0;
	socklen_t length = sizeof(int);
	getsockopt(3, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length);
	getsockopt(3, SOL_SOCKET, SO_TYPE, &kind, &length);
	fact("listens", "%d", listens);
	fact("stream", "%d", kind == SOCK_STREAM);
	fact("flags", "%d", fcntl(3, F_GETFL) & O_NONBLOCK);
	fact("inherited", "%d", !(fcntl(3, F_GETFD) & FD_CLOEXEC));
	fact("pid", "%d", getpid());
	fact("uid", "%d", getuid());
	char directory[PATH_MAX];
	snprintf(directory, sizeof directory, "%s", path);
	*strrchr(directory, '/') = 0;
	struct stat about;
	if (stat(directory, &about) == 0)
		fact("directory", "%o %d", about.st_mode & 07777, about.st_uid == getuid());
	/* The name that the inherited socket was bound by: nothing is there. */
	struct sockaddr_un name = { 0 };
	length = sizeof name;
	getsockname(3, (struct sockaddr *)&name, &length);
	fact("reached", "%s", outcome(access(name.sun_path, F_OK)));
	fact("ready", "%d", 1);
}

static struct sockaddr_un address(const char *where)
{
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	snprintf(name.sun_path, sizeof name.sun_path, "%s", where);
	return name;
}

static int bind_at(const char *where)
{
	struct sockaddr_un name = address(where);
	own = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(own, (struct sockaddr *)&name, sizeof name) < 0)
		return -1;
	return listen(own, 1);
}

static int connect_to(const char *where)
{
	struct sockaddr_un name = address(where);
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int result = connect(fd, (struct sockaddr *)&name, sizeof name);
	int error = errno;
	close(fd);
	errno = error;
	return result;
}

/* A child that takes all the processor time it can get. */
static int spin(void)
{
	int pid = fork();
	if (pid == 0) {
		/* Not the connection either: its end is awaited. */
		close_range(3, ~0U, 0);
		for (;;)
			;
	}
	return pid;
}

static int fill(size_t bytes)
{
	char *memory = malloc(bytes);
	if (!memory)
		return -1;
	memset(memory, 1, bytes);
	return memory[bytes / 2] - 1;
}

static int act(const char *word, const char *argument)
{
	const char *where = *argument ? argument : path;
	/* Or nothing: who connected went away. */
	if (!*word || !strcmp(word, "hello"))
		return 0;
	if (!strcmp(word, "bind"))
		return bind_at(where);
	if (!strcmp(word, "link"))
		return symlink(where, path);
	if (!strcmp(word, "fifo"))
		return mkfifo(path, 0700);
	if (!strcmp(word, "file"))
		return open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0777);
	if (!strcmp(word, "directory"))
		return mkdir(where, 0777);
	if (!strcmp(word, "lock"))
		return chmod(where, 0);
	if (!strcmp(word, "remove"))
		return remove(path);
	if (!strcmp(word, "deaf"))
		return own < 0 ? -1 : close(own), own = -1, 0;
	if (!strcmp(word, "close"))
		return close(3);
	if (!strcmp(word, "connect"))
		return connect_to(where);
	if (!strcmp(word, "see"))
		return access(where, F_OK);
	if (!strcmp(word, "spin"))
		return spin();
	if (!strcmp(word, "fill"))
		return fill(strtoull(argument, NULL, 10));
	if (!strcmp(word, "stall"))
		return pause();
	if (!strcmp(word, "exit"))
		_exit(atoi(argument));
	misuse("no such word: %s", word);
}

/* The interfaces of the network namespace that a socket belongs to, and whether they are up:
 * any socket tells, also one of the Unix family. */
static void tell_interfaces(int socket, int to)
{
	for (int index = 1; index < 256; index++) {
		struct ifreq about = { .ifr_ifindex = index };
		if (ioctl(socket, SIOCGIFNAME, &about) < 0)
			continue;
		int up = ioctl(socket, SIOCGIFFLAGS, &about) == 0 && about.ifr_flags & IFF_UP;
		dprintf(to, "%s:%s ", about.ifr_name, up ? "up" : "down");
	}
}

/* Who connected, and what can be done to him by what is told of him. */
static void tell_peer(int socket)
{
	struct ucred peer = { .pid = -1 };
	socklen_t length = sizeof peer;
	int got = getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length);
	dprintf(socket, "%s pid %d uid %d ", outcome(got), peer.pid, peer.uid);
	int pidfd = -1;
	length = sizeof pidfd;
	if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &length) < 0) {
		dprintf(socket, "pidfd %s", outcome(-1));
		return;
	}
	dprintf(socket, "pidfd ok signal %s ", outcome(syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0)));
	char path[64], text[512] = "";
	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", pidfd);
	int about = open(path, O_RDONLY | O_CLOEXEC);
	if (about >= 0 && read(about, text, sizeof text - 1) > 0 && strstr(text, "\nPid:"))
		dprintf(socket, "number %d", atoi(strstr(text, "\nPid:") + 5));
	close(about);
	close(pidfd);
}

static void serve(int listener)
{
	char line[512];
	size_t length = 0;
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (fd < 0)
		return;
	while (length < sizeof line - 1 && read(fd, line + length, 1) == 1)
		if (line[length++] == '\n') {
			length--;
			break;
		}
	line[length] = 0;
	char *argument = strchr(line, ' ');
	if (argument)
		*argument++ = 0;
	const char *from = listener == 3 ? "inherited" : "own";
	if (!strcmp(line, "interfaces") || !strcmp(line, "peer")) {
		if (*line == 'p')
			tell_peer(fd);
		else
			tell_interfaces(argument ? atoi(argument) : fd, fd);
		close(fd);
		return;
	}
	dprintf(fd, "%s %s\n", from, outcome(act(line, argument ? argument : "")));
	close(fd);
}

int main(void)
{
	path = getenv("GRPC_UNIX_SOCKET");
	if (!path)
		misuse("no GRPC_UNIX_SOCKET");
	signal(SIGPIPE, SIG_IGN);
	tell_facts();
	for (;;) {
		struct pollfd fds[] = { { .fd = 3, .events = POLLIN },
					{ .fd = own, .events = POLLIN } };
		if (poll(fds, 2, -1) < 0)
			return 1;
		for (int index = 0; index < 2; index++)
			if (fds[index].revents & POLLIN)
				serve(fds[index].fd);
		/* What is closed would be told for ever. */
		if (fds[0].revents & POLLNVAL)
			pause();
	}
}
