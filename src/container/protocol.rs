//! What goes between the dispatcher and `dispatch-init` in a container.
//!
//! Both are compiled with this file: it needs nothing but `core`.
//!
//! To init, on its standard input: a [`Header`], and the strings that it announces, each
//! ended by a NUL: the path to execute, the arguments (argv[0] is the first), the
//! environment. What follows is the program's own input.
//!
//! From init, at the end of its standard output and of its standard error: one [`Record`]
//! each. Before it stands what the program wrote, and all of it: nothing that could write
//! is left. The nonce makes it init's: the program has never seen it. An init that ended
//! without the two records has told nothing, whatever its exit code.

/// Where init stands in the container.
pub const INIT_PATH: &str = "/run/dispatcher/init";

/// The FIFO whose only writer is the dispatcher: as long as it has it open, init goes on.
/// The container's user must not be able to open it for writing.
pub const HOLD_PATH: &core::ffi::CStr = c"/run/dispatcher/hold";

/// Bytes of the word that tells init's records from all that a program can write.
pub const NONCE_LEN: usize = 16;

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
}

impl Header {
    /// Its size in bytes.
    pub const LEN: usize = NONCE_LEN + 12;

    /// As it is sent: the nonce, then the numbers, little-endian.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        join(&mut bytes, &self.nonce, &[self.arguments, self.environment, self.strings_len]);
        bytes
    }

    /// Reads one; `None` where a bound isn't kept.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Option<Self> {
        let (nonce, [arguments, environment, strings_len]) = split(bytes)?;
        let kept = arguments <= ARGUMENTS_MAX
            && environment <= ENVIRONMENT_MAX
            && (1..=STRINGS_MAX).contains(&strings_len);
        kept.then_some(Self { nonce, arguments, environment, strings_len })
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
    pub const LEN: usize = NONCE_LEN + 16;

    const ENDED: u32 = 1;
    const NOT_STARTED: u32 = 2;
    const DENIED: u32 = 1;
    const LEFT_BEHIND: u32 = 2;

    /// As it is written: the nonce; kind, value, flags and a zero, little-endian.
    #[must_use]
    pub fn encode(&self, nonce: &[u8; NONCE_LEN]) -> [u8; Self::LEN] {
        let (kind, value) = match self.verdict {
            Verdict::Ended(status) => (Self::ENDED, status),
            Verdict::NotStarted(errno) => (Self::NOT_STARTED, errno),
        };
        let denied = if self.denied { Self::DENIED } else { 0 };
        let left_behind = if self.left_behind { Self::LEFT_BEHIND } else { 0 };
        let mut bytes = [0; Self::LEN];
        join(&mut bytes, nonce, &[kind, value, denied | left_behind, 0]);
        bytes
    }

    /// Reads one; `None` for anything that init of this nonce doesn't write.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN], nonce: &[u8; NONCE_LEN]) -> Option<Self> {
        let (found, [kind, value, flags, zero]) = split(bytes)?;
        let verdict = match kind {
            Self::ENDED => Verdict::Ended(value),
            Self::NOT_STARTED => Verdict::NotStarted(value),
            _ => return None,
        };
        let known = found == *nonce && flags & !(Self::DENIED | Self::LEFT_BEHIND) == 0;
        (known && zero == 0).then_some(Self {
            verdict,
            denied: flags & Self::DENIED != 0,
            left_behind: flags & Self::LEFT_BEHIND != 0,
        })
    }
}

/// A nonce and numbers into their bytes.
fn join(bytes: &mut [u8], nonce: &[u8; NONCE_LEN], numbers: &[u32]) {
    let words = numbers.iter().flat_map(|number| number.to_le_bytes());
    for (byte, from) in bytes.iter_mut().zip(nonce.iter().copied().chain(words)) {
        *byte = from;
    }
}

/// And back; `None` where there are too few bytes.
fn split<const N: usize>(bytes: &[u8]) -> Option<([u8; NONCE_LEN], [u32; N])> {
    let (nonce, rest) = bytes.split_first_chunk()?;
    let (words, _) = rest.as_chunks();
    let mut numbers = [0; N];
    for (index, number) in numbers.iter_mut().enumerate() {
        *number = u32::from_le_bytes(*words.get(index)?);
    }
    Some((*nonce, numbers))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: [u8; NONCE_LEN] = *b"0123456789abcdef";

    #[test]
    fn headers_are_read_as_they_were_written() {
        let header = Header { nonce: NONCE, arguments: 1, environment: 0x203, strings_len: 0x4_05 };
        let bytes = header.encode();
        assert_eq!(&bytes, b"0123456789abcdef\x01\0\0\0\x03\x02\0\0\x05\x04\0\0");
        assert_eq!(Header::decode(&bytes), Some(header));
    }

    #[test]
    fn headers_keep_their_bounds() {
        let most = Header {
            nonce: NONCE,
            arguments: ARGUMENTS_MAX,
            environment: ENVIRONMENT_MAX,
            strings_len: STRINGS_MAX,
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
        assert_eq!(ended.encode(&NONCE), bytes);
    }

    #[test]
    fn only_whole_records_of_the_nonce_are_taken() {
        let record = Record { verdict: Verdict::Ended(0), denied: false, left_behind: false };
        let good = record.encode(&NONCE);
        // Any bit but one of the value's and the two flags'.
        for bit in (0..Record::LEN * 8).filter(|bit| !(160..194).contains(bit)) {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            // One such bit makes one kind of the other: kinds 1 and 2 differ in two.
            assert_eq!(Record::decode(&bytes, &NONCE), None, "bit {bit}");
        }
    }
}
