//! What kind of executable some bytes are, without trusting a single one.

use std::{fmt, path::Path};

/// Longest path of a loader or interpreter, in bytes.
const PATH_LEN_MAX: usize = 4096;

/// Longest `#!` line that the kernel reads, in bytes.
const SCRIPT_LINE_MAX: usize = 256;

/// Something that this machine can execute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executable {
    /// Needs nothing but the kernel.
    Static,
    /// Needs this loader, an absolute path (`PT_INTERP`).
    Dynamic {
        /// Such as `/lib64/ld-linux-x86-64.so.2`.
        loader: String,
    },
    /// Begins with `#!`.
    Script {
        /// The interpreter, an absolute path.
        interpreter: String,
        /// The line's one argument, if it has one.
        argument: Option<String>,
    },
}

impl Executable {
    /// What runs it, where it is a script.
    #[must_use]
    pub fn interpreter(&self) -> Option<&str> {
        match self {
            Self::Script { interpreter, .. } => Some(interpreter),
            Self::Static | Self::Dynamic { .. } => None,
        }
    }
}

/// Why some bytes can't be executed here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// Neither ELF nor `#!`.
    #[error("the artifact is not an executable: it begins with {0}, not with an ELF header or #!")]
    Unknown(Beginning),
    /// ELF, but not a program, or damaged.
    #[error("the artifact is not an executable: {0}")]
    NotExecutable(&'static str),
    /// For another machine.
    #[error("the artifact is for another architecture: {found}; this dispatcher runs {WANTED}")]
    WrongArchitecture {
        /// In words.
        found: String,
    },
}

/// The first bytes of something, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beginning(Vec<u8>);

impl fmt::Display for Beginning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

#[cfg(target_arch = "x86_64")]
const WANTED: &str = "64-bit x86_64";
#[cfg(target_arch = "aarch64")]
const WANTED: &str = "64-bit aarch64";

/// Tells what `bytes` are.
///
/// # Errors
/// [`ElfError`] for what can't be executed on this machine.
pub fn inspect(bytes: &[u8]) -> Result<Executable, ElfError> {
    if let Some(rest) = bytes.strip_prefix(b"#!") {
        return script(rest);
    }
    if !bytes.starts_with(b"\x7fELF") {
        return Err(ElfError::Unknown(Beginning(bytes.iter().copied().take(8).collect())));
    }
    let header = Header::read(bytes)?;
    match header.loader(bytes)? {
        Some(loader) => Ok(Executable::Dynamic { loader }),
        None => Ok(Executable::Static),
    }
}

fn script(rest: &[u8]) -> Result<Executable, ElfError> {
    let damaged = |what| Err(ElfError::NotExecutable(what));
    let window = &rest[..rest.len().min(SCRIPT_LINE_MAX - 2)];
    let line = match window.iter().position(|byte| *byte == b'\n') {
        Some(end) => &window[..end],
        None if window.len() == rest.len() => window,
        None => return damaged("its #! line is longer than 256 bytes"),
    };
    let Ok(line) = std::str::from_utf8(line) else { return damaged("its #! line is not UTF-8") };
    let line = line.trim_matches([' ', '\t']);
    let (interpreter, argument) = match line.split_once([' ', '\t']) {
        Some((interpreter, argument)) => {
            (interpreter, Some(argument.trim_start_matches([' ', '\t'])))
        }
        None => (line, None),
    };
    if !Path::new(interpreter).is_absolute() {
        return damaged("its #! line names no absolute path");
    }
    if line.contains(['\0', '\r']) {
        return damaged("its #! line holds a NUL or a carriage return (DOS line ends?)");
    }
    Ok(Executable::Script {
        interpreter: interpreter.to_owned(),
        argument: argument.map(str::to_owned),
    })
}

/// What is needed of an ELF64 header.
struct Header {
    segments_at: u64,
    segment_size: u16,
    segments: u16,
}

impl Header {
    fn read(bytes: &[u8]) -> Result<Self, ElfError> {
        let truncated = || ElfError::NotExecutable("its ELF header is cut short");
        let class = *bytes.get(4).ok_or_else(truncated)?;
        let order = *bytes.get(5).ok_or_else(truncated)?;
        if order != 1 {
            return Err(ElfError::WrongArchitecture { found: "big-endian".to_owned() });
        }
        let kind = u16_at(bytes, 16).ok_or_else(truncated)?;
        let machine = u16_at(bytes, 18).ok_or_else(truncated)?;
        if class != 2 || machine != MACHINE {
            let found = format!("{}-bit {}", if class == 1 { 32 } else { 64 }, name(machine));
            return Err(ElfError::WrongArchitecture { found });
        }
        match kind {
            2 | 3 => {}
            1 => return Err(ElfError::NotExecutable("it is an object file, not linked yet")),
            4 => return Err(ElfError::NotExecutable("it is a core dump")),
            _ => return Err(ElfError::NotExecutable("its ELF type is unknown")),
        }
        Ok(Self {
            segments_at: u64_at(bytes, 32).ok_or_else(truncated)?,
            segment_size: u16_at(bytes, 54).ok_or_else(truncated)?,
            segments: u16_at(bytes, 56).ok_or_else(truncated)?,
        })
    }

    /// The path in its `PT_INTERP`, if it has one.
    fn loader(&self, bytes: &[u8]) -> Result<Option<String>, ElfError> {
        let damaged = |what| Err(ElfError::NotExecutable(what));
        if self.segment_size != 56 || self.segments == 0 {
            return damaged("it has no program headers");
        }
        let start = usize::try_from(self.segments_at).ok();
        let size = usize::from(self.segment_size) * usize::from(self.segments);
        let table = start.and_then(|start| bytes.get(start..start.checked_add(size)?));
        let Some(table) = table else { return damaged("its program headers are cut short") };
        let interpreter = |segment: &&[u8]| u32_at(segment, 0) == Some(3);
        let Some(segment) = table.chunks_exact(usize::from(self.segment_size)).find(interpreter)
        else {
            return Ok(None);
        };
        let range = u64_at(segment, 8).zip(u64_at(segment, 32)).and_then(|(start, size)| {
            let start = usize::try_from(start).ok()?;
            Some(start..start.checked_add(usize::try_from(size).ok()?)?)
        });
        let path = range.filter(|range| range.len() <= PATH_LEN_MAX).and_then(|r| bytes.get(r));
        let path = path.and_then(|path| path.strip_suffix(b"\0"));
        match path.and_then(|path| std::str::from_utf8(path).ok()) {
            Some(path) if Path::new(path).is_absolute() && !path.contains('\0') => {
                Ok(Some(path.to_owned()))
            }
            _ => damaged("its loader's path is malformed"),
        }
    }
}

fn name(machine: u16) -> String {
    match machine {
        3 => "x86".to_owned(),
        8 => "MIPS".to_owned(),
        21 => "PowerPC".to_owned(),
        22 => "s390x".to_owned(),
        40 => "ARM".to_owned(),
        62 => "x86_64".to_owned(),
        183 => "aarch64".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("machine {other}"),
    }
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    array_at(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    array_at(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    array_at(bytes, at).map(u64::from_le_bytes)
}

/// An ELF program for tests: a header, its program headers, and a loader's path.
#[cfg(test)]
pub(crate) fn sample(loader: Option<&str>) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    bytes[16..18].copy_from_slice(&3_u16.to_le_bytes());
    bytes[18..20].copy_from_slice(&MACHINE.to_le_bytes());
    bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
    bytes[54..56].copy_from_slice(&56_u16.to_le_bytes());
    bytes[56..58].copy_from_slice(&1_u16.to_le_bytes());
    let mut segment = [0; 56];
    segment[0] = 1;
    if let Some(loader) = loader {
        segment[0] = 3;
        segment[8..16].copy_from_slice(&120_u64.to_le_bytes());
        segment[32..40].copy_from_slice(&(loader.len() as u64 + 1).to_le_bytes());
    }
    bytes.extend_from_slice(&segment);
    if let Some(loader) = loader {
        bytes.extend_from_slice(loader.as_bytes());
        bytes.push(0);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn programs_are_told_apart() {
        assert_eq!(inspect(&sample(None)), Ok(Executable::Static));
        let loader = "/lib64/ld-linux-x86-64.so.2";
        assert_eq!(
            inspect(&sample(Some(loader))),
            Ok(Executable::Dynamic { loader: loader.to_owned() })
        );
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert!(inspect(&own).is_ok(), "the test program itself");
    }

    #[test]
    fn scripts_name_their_interpreter() {
        let script = |text: &str| inspect(text.as_bytes());
        let expected = |interpreter: &str, argument: Option<&str>| {
            Ok(Executable::Script {
                interpreter: interpreter.to_owned(),
                argument: argument.map(str::to_owned),
            })
        };
        assert_eq!(script("#!/bin/sh\necho"), expected("/bin/sh", None));
        assert_eq!(script("#! /bin/sh"), expected("/bin/sh", None));
        assert_eq!(script("#!/bin/sh \t\n"), expected("/bin/sh", None));
        assert_eq!(script("#!/usr/bin/env  a b\n"), expected("/usr/bin/env", Some("a b")));
        for bad in ["#!", "#!\n", "#!sh\n", "#!/bin/sh\r\n", &format!("#!/{}\n", "x".repeat(300))] {
            assert!(matches!(script(bad), Err(ElfError::NotExecutable(_))), "{bad:?}");
        }
    }

    #[test]
    fn others_are_refused_by_name() {
        assert!(matches!(inspect(b""), Err(ElfError::Unknown(_))));
        assert!(inspect(b"hello\x1b").unwrap_err().to_string().contains("\"hello\\x1b\""));
        assert!(matches!(inspect(b"\x7fELF"), Err(ElfError::NotExecutable(_))));
        let with = |at: usize, value: &[u8]| {
            let mut bytes = sample(Some("/lib/ld.so"));
            bytes[at..at + value.len()].copy_from_slice(value);
            inspect(&bytes).unwrap_err()
        };
        for wrong in [with(4, &[1]), with(5, &[2]), with(18, &[40, 0])] {
            assert!(matches!(wrong, ElfError::WrongArchitecture { .. }), "{wrong}");
        }
        assert!(with(18, &[40, 0]).to_string().contains("64-bit ARM"));
        for not in [
            with(16, &[1]),
            with(16, &[4]),
            with(54, &[0]),
            with(56, &[9]),
            with(32, &[255; 8]),
            with(72, &[255; 8]),
            with(96, &[255; 8]),
            with(96, &[0; 8]),
            with(120, b"relative\0"),
        ] {
            assert!(matches!(not, ElfError::NotExecutable(_)), "{not}");
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0_usize..140, value: u8, length in 0_usize..140) {
            let mut bytes = sample(Some("/lib64/ld-linux-x86-64.so.2"));
            let at = at % bytes.len();
            bytes[at] = value;
            bytes.truncate(length);
            let _ = inspect(&bytes);
        }

        #[test]
        fn noise_never_panics(tail: Vec<u8>, magic in prop_oneof![Just(&b"\x7fELF\x02\x01"[..]), Just(&b"#!"[..])]) {
            let _ = inspect(&[magic, &tail].concat());
        }
    }
}
