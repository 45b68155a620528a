//! What goes between the dispatcher and `dispatch-init` in a container.
//!
//! Both are compiled with this file: it needs nothing but `core`.
//!
//! To init, on its standard input: a [`Header`], and the strings that it announces, each
//! ended by a NUL: the path to execute, the arguments (argv[0] is the first), the
//! environment. What follows is the program's own input.
//!
//! A program that [listens](Header::listens) gets a socket that init makes and listens at,
//! in the container itself: at [`LISTENER_PATH`], where nobody is yet but init and who can
//! reach in from outside. The dispatcher opens the socket's inode there, connects to it by
//! that, sees that it is init who listens, and sends [`GO`]. Init takes the name away before
//! the program is there: it finds the socket as its descriptor 3, and nothing at that path.
//!
//! From init, at the end of its standard output and of its standard error: one [`Record`]
//! each. Before it stands what the program wrote, and all of it: nothing that could write
//! is left. The nonce makes it init's: the program has never seen it. Half of it marks the
//! record. The other half is never written: it is the key of the record's seal, since a
//! program can read its streams, of which the runtime makes it the owner, and have others
//! read them after its end. An init that ended without the two records has told nothing,
//! whatever its exit code.

/// Where init stands in the container.
pub const INIT_PATH: &str = "/run/dispatcher/init";

/// The FIFO whose only writer is the dispatcher: as long as it has it open, init goes on.
/// The container's user must not be able to open it for writing.
pub const HOLD_PATH: &core::ffi::CStr = c"/run/dispatcher/hold";

/// The directory of a service's own, a file system by itself.
pub const SERVICE_DIRECTORY: &str = "/run/grpc";

/// Where init listens for the program, until the dispatcher has connected once.
pub const LISTENER_PATH: &core::ffi::CStr = c"/run/grpc/inherited.sock";

/// What the dispatcher sends over that first connection; then the program is started.
pub const GO: u8 = b'g';

/// Connections that may wait for the program to take them, listen(2). It may change that.
pub const BACKLOG: u32 = 128;

/// What a program that listens finds in its environment besides what was sent, and besides
/// [`LISTEN_PID`]: `jail::message::LISTEN_VARIABLES`.
pub const LISTEN_ENTRIES: [&core::ffi::CStr; 3] =
    [c"LISTEN_FDS=1", c"LISTEN_FDNAMES=grpc", c"GRPC_UNIX_SOCKET=/run/grpc/service.sock"];

/// Before the program's own pid.
pub const LISTEN_PID: &[u8] = b"LISTEN_PID=";

/// Bytes of the secret that tells init's records from all that a program can write: the
/// mark, and the key of the seal.
pub const NONCE_LEN: usize = MARK_LEN + KEY_LEN;
/// Bytes of the mark.
pub const MARK_LEN: usize = 16;
const KEY_LEN: usize = 16;
const SEAL_LEN: usize = 16;

/// Most arguments.
pub const ARGUMENTS_MAX: u32 = 65_536;
/// Most entries of the environment.
pub const ENVIRONMENT_MAX: u32 = 65_536;
/// Most bytes of path, arguments and environment, with their NULs.
pub const STRINGS_MAX: u32 = (1 << 20) + (64 << 10);

/// Init's own exit codes. None of them says how the program ended.
pub mod exit {
    /// The dispatcher is gone, or never sent a header.
    pub const DISMISSED: i32 = 0;
    /// What came on standard input is no message, or came by something that can be read
    /// again, nonce and all.
    pub const MALFORMED: i32 = 70;
    /// A record can't be written.
    pub const UNWRITTEN: i32 = 71;
    /// Not PID 1, or the kernel refused what init can't do without.
    pub const REFUSED: i32 = 72;
    /// The program's listening socket can't be made, or its path not be taken away.
    pub const DEAF: i32 = 73;
}

/// What comes first: who writes the records, and what follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Drawn for this container alone.
    pub nonce: [u8; NONCE_LEN],
    /// How many arguments.
    pub arguments: u32,
    /// How many entries of the environment.
    pub environment: u32,
    /// Bytes of all strings, with their NULs.
    pub strings_len: u32,
    /// Whether the program gets a listening socket as its descriptor 3.
    pub listens: bool,
}

impl Header {
    /// Its size in bytes.
    pub const LEN: usize = NONCE_LEN + 16;

    /// As it is sent: the nonce, then the numbers, little-endian.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        let numbers = [self.arguments, self.environment, self.strings_len, u32::from(self.listens)];
        join(&mut bytes, &self.nonce, &numbers);
        bytes
    }

    /// Reads one; `None` where a bound isn't kept.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let (nonce, [arguments, environment, strings_len, listens]) = split(bytes)?;
        let kept = arguments <= ARGUMENTS_MAX
            && environment <= ENVIRONMENT_MAX
            && (1..=STRINGS_MAX).contains(&strings_len)
            && listens <= 1;
        let listens = listens == 1;
        kept.then_some(Self { nonce, arguments, environment, strings_len, listens })
    }
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The program ended, with this wait status (wait(2)).
    Ended(u32),
    /// It could not be executed, for this error number.
    NotStarted(u32),
}

/// The last of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// How it went.
    pub verdict: Verdict,
    /// Somebody whom init reaped was killed by SIGSYS.
    pub denied: bool,
    /// The program left processes behind, which were killed.
    pub left_behind: bool,
}

impl Record {
    /// Its size in bytes; pipes take it in one piece.
    pub const LEN: usize = MARK_LEN + WORDS_LEN + SEAL_LEN;

    const ENDED: u32 = 1;
    const NOT_STARTED: u32 = 2;
    const DENIED: u32 = 1;
    const LEFT_BEHIND: u32 = 2;

    /// As it is written: the mark; kind, value, flags and a zero, little-endian; the seal
    /// of these words.
    #[must_use]
    pub fn encode(&self, nonce: &[u8; NONCE_LEN]) -> [u8; Self::LEN] {
        let (kind, value) = match self.verdict {
            Verdict::Ended(status) => (Self::ENDED, status),
            Verdict::NotStarted(errno) => (Self::NOT_STARTED, errno),
        };
        let denied = if self.denied { Self::DENIED } else { 0 };
        let left_behind = if self.left_behind { Self::LEFT_BEHIND } else { 0 };
        let mut words = [0; WORDS_LEN];
        join(&mut words, &[], &[kind, value, denied | left_behind, 0]);
        let (mark, key) = halves(nonce);
        let mut bytes = [0; Self::LEN];
        let parts = mark.iter().chain(&words).copied().chain(seal(&key, &words));
        for (byte, from) in bytes.iter_mut().zip(parts) {
            *byte = from;
        }
        bytes
    }

    /// Reads one; `None` for anything that init of this nonce doesn't write.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN], nonce: &[u8; NONCE_LEN]) -> Option<Self> {
        let (found, rest) = bytes.split_first_chunk::<MARK_LEN>()?;
        let (words, sealed) = rest.split_first_chunk::<WORDS_LEN>()?;
        let (mark, key) = halves(nonce);
        if *found != mark || *sealed != seal(&key, words) {
            return None;
        }
        let [kind, value, flags, zero] = numbers(words)?;
        let verdict = match kind {
            Self::ENDED => Verdict::Ended(value),
            Self::NOT_STARTED => Verdict::NotStarted(value),
            _ => return None,
        };
        let known = flags & !(Self::DENIED | Self::LEFT_BEHIND) == 0;
        (known && zero == 0).then_some(Self {
            verdict,
            denied: flags & Self::DENIED != 0,
            left_behind: flags & Self::LEFT_BEHIND != 0,
        })
    }
}

const WORDS_LEN: usize = 16;

/// The mark and the key.
fn halves(nonce: &[u8; NONCE_LEN]) -> ([u8; MARK_LEN], [u8; KEY_LEN]) {
    let (mut mark, mut key) = ([0; MARK_LEN], [0; KEY_LEN]);
    for (byte, from) in mark.iter_mut().chain(&mut key).zip(nonce) {
        *byte = *from;
    }
    (mark, key)
}

/// SipHash-2-4 with 128 bits: what nobody makes without the key.
fn seal(key: &[u8; KEY_LEN], words: &[u8; WORDS_LEN]) -> [u8; SEAL_LEN] {
    siphash(key, words)
}

fn siphash(key: &[u8; KEY_LEN], message: &[u8]) -> [u8; SEAL_LEN] {
    let number = |bytes: &[u8]| {
        bytes.iter().rev().fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
    };
    let (low, high) = (number(&key[..8]), number(&key[8..]));
    let mut v = [
        low ^ 0x736f_6d65_7073_6575,
        high ^ 0x646f_7261_6e64_6f6d ^ 0xee,
        low ^ 0x6c79_6765_6e65_7261,
        high ^ 0x7465_6462_7974_6573,
    ];
    let (blocks, rest) = message.as_chunks::<8>();
    let last = (message.len() as u64) << 56 | number(rest);
    for block in blocks.iter().map(|block| number(block)).chain([last]) {
        v[3] ^= block;
        rounds(&mut v, 2);
        v[0] ^= block;
    }
    let mut made = [0; SEAL_LEN];
    let (first, second) = made.split_at_mut(8);
    for (half, [at, twist]) in [first, second].into_iter().zip([[2, 0xee], [1, 0xdd]]) {
        v[at as usize & 3] ^= twist;
        rounds(&mut v, 4);
        let word = (v[0] ^ v[1] ^ v[2] ^ v[3]).to_le_bytes();
        for (byte, from) in half.iter_mut().zip(word) {
            *byte = from;
        }
    }
    made
}

fn rounds(v: &mut [u64; 4], count: u32) {
    for _ in 0..count {
        v[0] = v[0].wrapping_add(v[1]);
        v[1] = v[1].rotate_left(13) ^ v[0];
        v[0] = v[0].rotate_left(32);
        v[2] = v[2].wrapping_add(v[3]);
        v[3] = v[3].rotate_left(16) ^ v[2];
        v[0] = v[0].wrapping_add(v[3]);
        v[3] = v[3].rotate_left(21) ^ v[0];
        v[2] = v[2].wrapping_add(v[1]);
        v[1] = v[1].rotate_left(17) ^ v[2];
        v[2] = v[2].rotate_left(32);
    }
}

/// A prefix and numbers into their bytes.
fn join(bytes: &mut [u8], nonce: &[u8], numbers: &[u32]) {
    let words = numbers.iter().flat_map(|number| number.to_le_bytes());
    for (byte, from) in bytes.iter_mut().zip(nonce.iter().copied().chain(words)) {
        *byte = from;
    }
}

/// And back; `None` where there are too few bytes.
fn split<const N: usize>(bytes: &[u8]) -> Option<([u8; NONCE_LEN], [u32; N])> {
    let (nonce, rest) = bytes.split_first_chunk()?;
    Some((*nonce, numbers(rest)?))
}

fn numbers<const N: usize>(bytes: &[u8]) -> Option<[u32; N]> {
    let (words, _) = bytes.as_chunks();
    let mut numbers = [0; N];
    for (index, number) in numbers.iter_mut().enumerate() {
        *number = u32::from_le_bytes(*words.get(index)?);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: [u8; NONCE_LEN] = *b"0123456789abcdefthe key is 16 b.";

    #[test]
    fn the_seal_is_siphash() {
        // The first two of its authors' test vectors, `vectors_sip128`.
        let key = core::array::from_fn(|index| index as u8);
        let hex = |made: [u8; SEAL_LEN]| made.map(|byte| format!("{byte:02x}")).concat();
        assert_eq!(hex(siphash(&key, &[])), "a3817f04ba25a8e66df67214c7550293");
        assert_eq!(hex(siphash(&key, &[0])), "da87c1d86b99af44347659119b22fc45");
        let one = seal(&key, &[1; WORDS_LEN]);
        assert_ne!(one, seal(&[0; KEY_LEN], &[1; WORDS_LEN]));
        assert_ne!(one, seal(&key, &[2; WORDS_LEN]));
    }

    #[test]
    fn headers_are_read_as_they_were_written() {
        let header = Header {
            nonce: NONCE,
            arguments: 1,
            environment: 0x203,
            strings_len: 0x4_05,
            listens: true,
        };
        let bytes = header.encode();
        let numbers = b"\x01\0\0\0\x03\x02\0\0\x05\x04\0\0\x01\0\0\0";
        assert_eq!(bytes[..], [&NONCE[..], numbers].concat());
        assert_eq!(Header::decode(&bytes), Some(header));
        let silent = Header { listens: false, ..header };
        assert_eq!(Header::decode(&silent.encode()), Some(silent));
    }

    #[test]
    fn headers_keep_their_bounds() {
        let most = Header {
            nonce: NONCE,
            arguments: ARGUMENTS_MAX,
            environment: ENVIRONMENT_MAX,
            strings_len: STRINGS_MAX,
            listens: true,
        };
        assert_eq!(Header::decode(&most.encode()), Some(most));
        for header in [
            Header { arguments: ARGUMENTS_MAX + 1, ..most },
            Header { environment: ENVIRONMENT_MAX + 1, ..most },
            Header { strings_len: STRINGS_MAX + 1, ..most },
            Header { strings_len: 0, ..most },
            Header { arguments: u32::MAX, ..most },
        ] {
            assert_eq!(Header::decode(&header.encode()), None, "{header:?}");
        }
        let mut bytes = most.encode();
        bytes[Header::LEN - 4] = 2;
        assert_eq!(Header::decode(&bytes), None, "neither yes nor no");
    }

    #[test]
    fn a_service_is_told_what_the_protocol_says() {
        use crate::jail::message::{LISTEN_VARIABLES, SERVICE_SOCKET, SOCKET_VARIABLE};
        let entries = LISTEN_ENTRIES.map(|entry| entry.to_str().unwrap());
        let pid = std::str::from_utf8(LISTEN_PID).unwrap();
        let mut names: Vec<_> = entries
            .into_iter()
            .chain([pid])
            .map(|entry| entry.split_once('=').unwrap().0)
            .collect();
        names.sort_unstable();
        let mut said = LISTEN_VARIABLES;
        said.sort_unstable();
        assert_eq!(names, said);
        assert!(entries.contains(&&*format!("{SOCKET_VARIABLE}={SERVICE_SOCKET}")));
        for path in [SERVICE_SOCKET, LISTENER_PATH.to_str().unwrap()] {
            assert!(path.starts_with(&format!("{SERVICE_DIRECTORY}/")), "{path}");
        }
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        for verdict in [Verdict::Ended(0x8b), Verdict::NotStarted(2)] {
            for (denied, left_behind) in [(false, true), (true, false), (true, true)] {
                let record = Record { verdict, denied, left_behind };
                assert_eq!(Record::decode(&record.encode(&NONCE), &NONCE), Some(record));
            }
        }
        let ended = Record { verdict: Verdict::Ended(0x8b), denied: true, left_behind: false };
        let bytes = *b"0123456789abcdef\x01\0\0\0\x8b\0\0\0\x01\0\0\0\0\0\0\0";
        let record = ended.encode(&NONCE);
        assert_eq!(record[..32], bytes);
        assert!(!record.windows(8).any(|part| part == &NONCE[16..24]), "the key isn't in it");
    }

    #[test]
    fn only_whole_records_of_the_nonce_are_taken() {
        let record = Record { verdict: Verdict::Ended(0), denied: false, left_behind: false };
        let good = record.encode(&NONCE);
        for bit in 0..Record::LEN * 8 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&bytes, &NONCE), None, "bit {bit}");
        }
    }
}
