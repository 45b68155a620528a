/* gRPC services that are none, or bad ones. The word in HOSTILE, or the first
 * argument, says in which way; see the table at the end. Listens at the
 * inherited descriptor 3, or else at the path in GRPC_UNIX_SOCKET. Calls of
 * gRPC's own services (reflection, health) are answered with UNIMPLEMENTED, or
 * not at all, so that bad answers reach the call they are meant for. */
#include "probe.h"
#include <pthread.h>
#include <sys/socket.h>
#include <sys/un.h>

enum { DATA, HEADERS, RST_STREAM = 3, SETTINGS, PING = 6, GOAWAY, CONTINUATION = 9 };
enum { END_STREAM = 1, ACK = 1, END_HEADERS = 4 };
enum { FRAME_MAX = 16384 };

/* What is sent on one connection. */
struct peer {
	int fd;
	unsigned stream;
};

static void send_all(struct peer *peer, const void *bytes, size_t length)
{
	const char *rest = bytes;
	while (length > 0) {
		ssize_t n = write(peer->fd, rest, length);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0) {
			/* The other side has had enough. */
			close(peer->fd);
			pthread_exit(NULL);
		}
		rest += n;
		length -= n;
	}
}

static void frame(struct peer *peer, int type, int flags, unsigned stream, const void *payload,
		  size_t length)
{
	unsigned char head[9] = {
		length >> 16, length >> 8, length, type, flags,
		stream >> 24, stream >> 16, stream >> 8, stream,
	};
	send_all(peer, head, sizeof head);
	send_all(peer, payload, length);
}

/* A literal that is not indexed, and whose name isn't; both are shorter than 127. */
static size_t put_header(char *to, const char *name, const char *value)
{
	to[0] = 0;
	return 1 + sprintf(to + 1, "%c%s%c%s", (int)strlen(name), name, (int)strlen(value), value);
}

static void begin_answer(struct peer *peer)
{
	char block[256] = { (char)0x88 }; /* :status 200 */
	size_t length = 1 + put_header(block + 1, "content-type", "application/grpc");
	frame(peer, HEADERS, END_HEADERS, peer->stream, block, length);
}

static void message(struct peer *peer, int compressed, unsigned announced, const char *bytes,
		    size_t length, int flags)
{
	unsigned char data[512] = {
		compressed, announced >> 24, announced >> 16, announced >> 8, announced,
	};
	memcpy(data + 5, bytes, length);
	frame(peer, DATA, flags, peer->stream, data, 5 + length);
}

static void end_answer(struct peer *peer, const char *status)
{
	char block[256];
	size_t length = status ? put_header(block, "grpc-status", status)
			       : put_header(block, "x-note", "no status");
	frame(peer, HEADERS, END_HEADERS | END_STREAM, peer->stream, block, length);
}

static void answer(struct peer *peer, const char *status)
{
	begin_answer(peer);
	message(peer, 0, 0, "", 0, 0);
	end_answer(peer, status);
}

/* Whatever comes is read and forgotten. */
static void read_for_ever(struct peer *peer)
{
	char buffer[65536];
	while (read(peer->fd, buffer, sizeof buffer) > 0)
		;
}

/* How it answers a call. */

static void ok(struct peer *peer)
{
	answer(peer, "0");
}

static void no_trailers(struct peer *peer)
{
	begin_answer(peer);
	message(peer, 0, 0, "", 0, END_STREAM);
}

static void no_status(struct peer *peer)
{
	answer(peer, NULL);
}

static void status_999(struct peer *peer)
{
	answer(peer, "999");
}

static void status_minus(struct peer *peer)
{
	answer(peer, "-1");
}

static void status_text(struct peer *peer)
{
	answer(peer, "fine");
}

static void two(struct peer *peer)
{
	begin_answer(peer);
	message(peer, 0, 0, "", 0, 0);
	message(peer, 0, 0, "", 0, 0);
	end_answer(peer, "0");
}

static void none(struct peer *peer)
{
	begin_answer(peer);
	end_answer(peer, "0");
}

static void truncated(struct peer *peer)
{
	begin_answer(peer);
	message(peer, 0, 100, "short", 5, 0);
	end_answer(peer, "0");
}

static void compressed(struct peer *peer)
{
	begin_answer(peer);
	message(peer, 1, 5, "\x1f\x8b zz", 5, 0);
	end_answer(peer, "0");
}

static void reset(struct peer *peer)
{
	frame(peer, RST_STREAM, 0, peer->stream, "\0\0\0\2", 4); /* INTERNAL_ERROR */
}

static void html(struct peer *peer)
{
	char block[256] = { (char)0x8d }; /* :status 404 */
	size_t length = 1 + put_header(block + 1, "content-type", "text/html");
	frame(peer, HEADERS, END_HEADERS, peer->stream, block, length);
	frame(peer, DATA, END_STREAM, peer->stream, "<h1>no</h1>", 11);
}

static void huge(struct peer *peer)
{
	static char block[FRAME_MAX];
	begin_answer(peer);
	message(peer, 0, 0xffffffff, "", 0, 0);
	for (;;) /* whatever the other side's windows */
		frame(peer, DATA, 0, peer->stream, block, sizeof block);
}

static void continuation(struct peer *peer)
{
	static char block[FRAME_MAX];
	size_t length = 0;
	while (length + 128 < sizeof block)
		length += put_header(block + length, "x-filler", "0123456789abcdef0123456789abcdef");
	frame(peer, HEADERS, 0, peer->stream, "\x88", 1);
	for (;;)
		frame(peer, CONTINUATION, 0, peer->stream, block, length);
}

static void headers(struct peer *peer)
{
	/* 103 Early Hints, again and again. */
	char block[64] = { 8, 3, '1', '0', '3' };
	for (;;)
		frame(peer, HEADERS, END_HEADERS, peer->stream, block, 5);
}

static void bomb(struct peer *peer)
{
	/* A field of the static table for each byte: accept-encoding: gzip, deflate. */
	char block[250];
	memset(block, 0x90, sizeof block);
	begin_answer(peer);
	for (;;)
		frame(peer, HEADERS, END_HEADERS, peer->stream, block, sizeof block);
}

static void trailers(struct peer *peer)
{
	enum { COUNT = 10000 };
	size_t length, sent = 0;
	char *block = malloc(COUNT * 32 + 64), name[32];
	length = put_header(block, "grpc-status", "0");
	for (int i = 0; i < COUNT; i++) {
		sprintf(name, "x-%d", i);
		length += put_header(block + length, name, "v");
	}
	begin_answer(peer);
	message(peer, 0, 0, "", 0, 0);
	while (sent < length) {
		size_t part = length - sent < FRAME_MAX ? length - sent : FRAME_MAX;
		int type = sent ? CONTINUATION : HEADERS;
		int flags = (sent ? 0 : END_STREAM) | (sent + part == length ? END_HEADERS : 0);
		frame(peer, type, flags, peer->stream, block + sent, part);
		sent += part;
	}
	free(block);
}

static void pings(struct peer *peer)
{
	for (;;)
		frame(peer, PING, 0, 0, "12345678", 8);
}

static void hang(struct peer *peer)
{
	(void)peer; /* the call is never answered */
}

static int read_all(struct peer *peer, void *bytes, size_t length)
{
	char *rest = bytes;
	while (length > 0) {
		ssize_t n = read(peer->fd, rest, length);
		if (n <= 0)
			return 0;
		rest += n;
		length -= n;
	}
	return 1;
}

/* A good answer; but gRPC's own services give none. */
static void unreflected(struct peer *peer)
{
	ok(peer);
}

/* Whether these headers are of a call of "/grpc.…", Huffman-coded or plain. */
static int is_of_grpc(const unsigned char *block, size_t length)
{
	return memmem(block, length, "\x62\x6b\x2b\x22", 4) || memmem(block, length, "/grpc.", 6);
}

/* Speaks HTTP/2 as far as needed, and answers each call once it has sent something. */
static void serve(struct peer *peer, void (*reply)(struct peer *))
{
	static __thread unsigned char payload[FRAME_MAX], answered[1 << 16];
	unsigned char preface[24], head[9];
	if (!read_all(peer, preface, sizeof preface))
		return;
	frame(peer, SETTINGS, 0, 0, "", 0);
	while (read_all(peer, head, sizeof head)) {
		size_t length = head[0] << 16 | head[1] << 8 | head[2];
		unsigned stream = (unsigned)head[5] << 24 | head[6] << 16 | head[7] << 8 | head[8];
		unsigned char *done = &answered[stream / 2 % sizeof answered];
		if (length > sizeof payload || !read_all(peer, payload, length))
			return;
		if (head[3] == SETTINGS && !(head[4] & ACK))
			frame(peer, SETTINGS, ACK, 0, "", 0);
		else if (head[3] == PING && !(head[4] & ACK))
			frame(peer, PING, ACK, 0, payload, length);
		else if (head[3] == HEADERS && is_of_grpc(payload, length)) {
			*done = 1;
			if (reply == unreflected)
				continue;
			peer->stream = stream;
			begin_answer(peer);
			end_answer(peer, "12"); /* UNIMPLEMENTED */
		} else if (head[3] == DATA && !*done) {
			*done = 1;
			peer->stream = stream;
			reply(peer);
		}
	}
}

/* How it takes a connection. */

static void silent(struct peer *peer)
{
	(void)peer;
	forever();
}

static void http1(struct peer *peer)
{
	static const char text[] = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n"
				   "Content-Length: 6\r\n\r\nhello\n";
	send_all(peer, text, sizeof text - 1);
	read_for_ever(peer);
}

static void garbage(struct peer *peer)
{
	unsigned char block[4096];
	unsigned state = 1;
	for (size_t i = 0; i < sizeof block; i++)
		block[i] = (state = state * 1103515245 + 12345) >> 16;
	send_all(peer, block, sizeof block);
	read_for_ever(peer);
}

static void settings(struct peer *peer)
{
	frame(peer, SETTINGS, 0, 0, "", 0);
	read_for_ever(peer);
}

static void hangup(struct peer *peer)
{
	char preface[24];
	read_all(peer, preface, sizeof preface);
}

static void goaway(struct peer *peer)
{
	frame(peer, SETTINGS, 0, 0, "", 0);
	frame(peer, GOAWAY, 0, 0, "\0\0\0\0\0\0\0\0", 8);
	read_for_ever(peer);
}

/* What it leaves at the path instead of a socket. */

static void make_symlink(const char *path)
{
	if (symlink("/proc/self/fd/0", path) < 0)
		misuse("symlink: %s", error_name());
}

static void make_fifo(const char *path)
{
	if (mkfifo(path, 0666) < 0)
		misuse("mkfifo: %s", error_name());
}

static void make_file(const char *path)
{
	close(open(path, O_CREAT | O_WRONLY, 0666));
}

static void make_nothing(const char *path)
{
	(void)path;
}

static const struct way {
	const char *name;
	void (*reply)(struct peer *);
	void (*connection)(struct peer *);
	void (*instead)(const char *);
} ways[] = {
	{ "ok", ok, NULL, NULL },
	{ "unreflected", unreflected, NULL, NULL },
	{ "no-trailers", no_trailers, NULL, NULL },
	{ "no-status", no_status, NULL, NULL },
	{ "status-999", status_999, NULL, NULL },
	{ "status-minus", status_minus, NULL, NULL },
	{ "status-text", status_text, NULL, NULL },
	{ "two", two, NULL, NULL },
	{ "none", none, NULL, NULL },
	{ "truncated", truncated, NULL, NULL },
	{ "compressed", compressed, NULL, NULL },
	{ "reset", reset, NULL, NULL },
	{ "html", html, NULL, NULL },
	{ "huge", huge, NULL, NULL },
	{ "continuation", continuation, NULL, NULL },
	{ "headers", headers, NULL, NULL },
	{ "bomb", bomb, NULL, NULL },
	{ "trailers", trailers, NULL, NULL },
	{ "pings", pings, NULL, NULL },
	{ "hang", hang, NULL, NULL },
	{ "silent", NULL, silent, NULL },
	{ "http1", NULL, http1, NULL },
	{ "garbage", NULL, garbage, NULL },
	{ "settings", NULL, settings, NULL },
	{ "hangup", NULL, hangup, NULL },
	{ "goaway", NULL, goaway, NULL },
	{ "symlink", NULL, NULL, make_symlink },
	{ "fifo", NULL, NULL, make_fifo },
	{ "file", NULL, NULL, make_file },
	{ "deaf", NULL, NULL, make_nothing },
};

static const struct way *way;

static void *attend(void *fd)
{
	struct peer peer = { (int)(intptr_t)fd, 0 };
	if (way->connection)
		way->connection(&peer);
	else
		serve(&peer, way->reply);
	close(peer.fd);
	return NULL;
}

static int inherited(void)
{
	const char *pid = getenv("LISTEN_PID"), *count = getenv("LISTEN_FDS");
	return pid && count && atoi(pid) == getpid() && atoi(count) >= 1;
}

static int listen_at(const char *path)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	strncpy(address.sun_path, path ? path : "", sizeof address.sun_path - 1);
	if (fd < 0 || bind(fd, (void *)&address, sizeof address) < 0 || listen(fd, 64) < 0)
		misuse("listen: %s", error_name());
	return fd;
}

int main(int argc, char **argv)
{
	const char *name = getenv("HOSTILE"), *path = getenv("GRPC_UNIX_SOCKET");
	if (!name)
		name = argc > 1 ? argv[1] : "";
	for (way = ways; strcmp(way->name, name) != 0;)
		if (++way == ways + sizeof ways / sizeof *ways)
			misuse("no such way: \"%s\"", name);
	fprintf(stderr, "hostile: %s\n", name);
	signal(SIGPIPE, SIG_IGN);
	if (way->instead) {
		/* Nobody is to be reached at what it inherited. */
		if (inherited())
			close(3);
		if (path)
			way->instead(path);
		forever();
	}
	int listener = inherited() ? 3 : listen_at(path);
	for (;;) {
		pthread_t thread;
		int fd = accept(listener, NULL, NULL);
		if (fd < 0)
			misuse("accept: %s", error_name());
		if (pthread_create(&thread, NULL, attend, (void *)(intptr_t)fd) != 0)
			misuse("pthread_create: %s", error_name());
		pthread_detach(thread);
	}
}
