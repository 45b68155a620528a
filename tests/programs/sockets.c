/* A service that does as it is told: takes one line from each connection to what it
 * listens at, does that, and answers with what came of it. The answer begins with the
 * socket that the connection came by, `inherited` or `own`. */
#include "probe.h"
#include <dirent.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

extern char **environ;

static int own = -1;
/* Whether connections come by it. */
static int serves;
static const char *path;

/* A socket that was bound at the path, in place of whatever is there. */
static int bound(int type)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	strncpy(address.sun_path, path, sizeof address.sun_path - 1);
	unlink(path);
	rmdir(path);
	int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0)
		return -1;
	return fd;
}

static void close_own(void)
{
	if (own >= 0)
		close(own);
	own = -1;
	serves = 0;
}

/* The names of the network interfaces that a socket tells of, one after the other. */
static void interfaces(FILE *to, const char *key, int fd)
{
	struct ifreq all[64];
	struct ifconf asked = { .ifc_len = sizeof all, .ifc_req = all };
	if (ioctl(fd, SIOCGIFCONF, &asked) < 0) {
		fprintf(to, "%s=%s\n", key, error_name());
		return;
	}
	for (size_t i = 0; i < asked.ifc_len / sizeof *all; i++)
		fprintf(to, "%s=%s\n", key, all[i].ifr_name);
}

static void names(FILE *to, const char *directory)
{
	struct dirent *entry;
	DIR *open = opendir(directory);
	while (open && (entry = readdir(open)))
		if (entry->d_name[0] != '.')
			fprintf(to, "%s=%s\n", directory, entry->d_name);
	if (open)
		closedir(open);
}

static void tell(FILE *to, int connection)
{
	for (int fd = 0; fd < 4096; fd++)
		/* The connection itself is no news. */
		if (fd != connection && fcntl(fd, F_GETFD) >= 0)
			fprintf(to, "fd=%d\n", fd);
	for (char **entry = environ; *entry; entry++)
		fprintf(to, "env=%s\n", *entry);
	fprintf(to, "pid=%d\n", getpid());
	int listens = 0;
	socklen_t size = sizeof listens;
	getsockopt(3, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size);
	fprintf(to, "listens=%d\n", listens);
	interfaces(to, "interface.listener", 3);
	interfaces(to, "interface.connection", connection);
	names(to, "/run/grpc");
	names(to, "/run/dispatcher");
	struct ucred peer;
	size = sizeof peer;
	getsockopt(connection, SOL_SOCKET, SO_PEERCRED, &peer, &size);
	fprintf(to, "peer.pid=%d\n", peer.pid);
}

/* Uses processor time, in milliseconds. */
static void burn(long wanted)
{
	while (clock() < wanted * (CLOCKS_PER_SEC / 1000))
		;
}

/* Somebody else calls listen, and is gone. */
static int orphan(void)
{
	if ((own = bound(SOCK_STREAM)) < 0)
		return -1;
	pid_t pid = fork();
	if (pid == 0)
		_exit(listen(own, 8) < 0);
	int status;
	return waitpid(pid, &status, 0) == pid && status == 0 ? 0 : -1;
}

static long act(const char *word, FILE *to, int connection)
{
	if (!strcmp(word, "tell"))
		return tell(to, connection), 0;
	if (!strncmp(word, "burn ", 5))
		return burn(atol(word + 5)), 0;
	if (!strncmp(word, "exit ", 5))
		exit(atoi(word + 5));
	close_own();
	if (!strcmp(word, "bind"))
		return (own = bound(SOCK_STREAM));
	if (!strcmp(word, "listen"))
		return (own = bound(SOCK_STREAM)) < 0 || listen(own, 8) < 0 ? -1 : (serves = 1);
	if (!strcmp(word, "orphan"))
		return orphan();
	if (!strcmp(word, "datagrams"))
		return (own = bound(SOCK_DGRAM));
	if (!strcmp(word, "unlisten"))
		return 0; /* the name stays */
	unlink(path);
	rmdir(path);
	if (!strcmp(word, "remove"))
		return 0;
	if (!strcmp(word, "file"))
		return open(path, O_CREAT | O_WRONLY | O_CLOEXEC, 0666);
	if (!strcmp(word, "fifo"))
		return mkfifo(path, 0666);
	if (!strcmp(word, "directory"))
		return mkdir(path, 0777);
	if (!strcmp(word, "link")) {
		/* To a socket that would do. */
		if ((own = bound(SOCK_STREAM)) < 0 || listen(own, 8) < 0)
			return -1;
		unlink("/run/grpc/real.sock");
		if (rename(path, "/run/grpc/real.sock") < 0)
			return -1;
		return symlink("/run/grpc/real.sock", path);
	}
	misuse("no such word: %s", word);
}

static void serve(int connection, const char *by)
{
	char line[256];
	size_t length = 0;
	while (length < sizeof line - 1) {
		ssize_t got = read(connection, line + length, sizeof line - 1 - length);
		if (got <= 0)
			break;
		length += got;
		if (line[length - 1] == '\n')
			break;
	}
	FILE *to = fdopen(connection, "w");
	if (length > 0) {
		line[length - 1] = 0;
		fprintf(to, "%s\n", by);
		fprintf(to, "%s\n", outcome(act(line, to, connection)));
	}
	fclose(to);
}

int main(int argc, char **argv)
{
	path = getenv("GRPC_UNIX_SOCKET");
	signal(SIGPIPE, SIG_IGN);
	if (argc > 1 && !strcmp(argv[1], "deaf"))
		close(3); /* and goes on */
	if (argc > 1 && !strcmp(argv[1], "idle"))
		for (;;)
			pause(); /* and takes no connection */
	fact("up", "%d", getpid());
	for (;;) {
		struct pollfd listeners[] = { { 3, POLLIN, 0 }, { serves ? own : -1, POLLIN, 0 } };
		if (argc > 1)
			listeners[0].fd = -1;
		poll(listeners, 2, -1);
		if (listeners[0].revents)
			serve(accept(3, NULL, NULL), "inherited");
		else if (listeners[1].revents)
			serve(accept(own, NULL, NULL), "own");
	}
}
