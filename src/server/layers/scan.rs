//! A look at a ServeRequest's shape before it is decoded.
//!
//! Bytes of the executable and of the input decode to as many bytes; a list or
//! a map decodes to many times its size. So those are added up first.

use std::ops::Range;

use bytes::{Buf, Bytes};

/// Counts the bytes of a serialized ServeRequest that are not in its large
/// fields: `input` (4), `service_binary` (6) and `options.input_bytes` (100.8).
/// What is malformed counts as far as it goes: the decoder refuses it.
pub(super) fn light_bytes(mut message: impl Buf) -> u64 {
    let mut light = 0;
    while message.has_remaining() {
        let before = message.remaining();
        let Some((field, length)) = next(&mut message) else {
            return light + before as u64;
        };
        match field {
            4 | 6 => {
                light += (before - message.remaining()) as u64;
                message.advance(length);
            }
            100 => {
                light += (before - message.remaining()) as u64;
                light += light_options(message.copy_to_bytes(length));
            }
            _ => {
                message.advance(length);
                light += (before - message.remaining()) as u64;
            }
        }
    }
    light
}

/// Where a serialized ServeRequest has its executable.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The field with its key and length.
    pub(super) field: Range<usize>,
    /// Its content.
    pub(super) binary: Range<usize>,
}

/// The one `service_binary` (6) of a message that has no `service_uri` (7), which
/// would take its place. `None` where there is none, or where anything is malformed.
pub(super) fn only_binary(mut message: Bytes) -> Option<Found> {
    let whole = message.len();
    let mut found = None;
    while message.has_remaining() {
        let start = whole - message.remaining();
        let is_bytes = message[0] & 7 == 2;
        let (field, length) = next(&mut message)?;
        let content = whole - message.remaining();
        message.advance(length);
        match field {
            6 if is_bytes && found.is_none() => {
                let end = content + length;
                found = Some(Found { field: start..end, binary: content..end });
            }
            6 | 7 => return None,
            _ => {}
        }
    }
    found
}

/// Whether some fields of a ServeRequest have an executable or name one, or are
/// malformed, so that nobody can tell.
pub(super) fn has_executable(mut fields: Bytes) -> bool {
    while fields.has_remaining() {
        match next(&mut fields) {
            None | Some((6 | 7, _)) => return true,
            Some((_, length)) => fields.advance(length),
        }
    }
    false
}

fn light_options(mut options: Bytes) -> u64 {
    let mut light = 0;
    while options.has_remaining() {
        let before = options.remaining();
        let Some((field, length)) = next(&mut options) else {
            return light + before as u64;
        };
        if field == 8 {
            light += (before - options.remaining()) as u64;
            options.advance(length);
        } else {
            options.advance(length);
            light += (before - options.remaining()) as u64;
        }
    }
    light
}

/// A field's beginning.
pub(super) struct Key {
    pub(super) field: u64,
    /// Bytes or a message, not a number.
    pub(super) is_bytes: bool,
    /// Bytes of the key itself, its length and, of a number, its value.
    pub(super) length: usize,
    /// Bytes of content that follow, or will.
    pub(super) content: usize,
}

/// The first field's beginning. `None` where that is not there in whole, or malformed.
pub(super) fn key(message: &[u8]) -> Option<Key> {
    let mut rest = message;
    let (field, content) = begin(&mut rest)?;
    let is_bytes = message.first()? & 7 == 2;
    Some(Key { field, is_bytes, length: message.len() - rest.len(), content })
}

/// Reads a field's beginning; all of its content must be there.
fn next(message: &mut impl Buf) -> Option<(u64, usize)> {
    begin(message).filter(|(_, length)| *length <= message.remaining())
}

/// Reads a field's key, and how many bytes of content follow; none for numbers,
/// which are read as well. `None` for what is malformed, and for groups.
fn begin(message: &mut impl Buf) -> Option<(u64, usize)> {
    let key = varint(message)?;
    let length = match key & 7 {
        0 => {
            varint(message)?;
            0
        }
        1 => 8,
        2 => usize::try_from(varint(message)?).ok()?,
        5 => 4,
        _ => return None,
    };
    Some((key >> 3, length))
}

fn varint(message: &mut impl Buf) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        if !message.has_remaining() {
            return None;
        }
        let byte = message.get_u8();
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ExecutionOptions, ServeRequest, serve_request::ServiceDef};
    use proptest::prelude::*;
    use prost::Message as _;

    fn light(request: &ServeRequest) -> u64 {
        light_bytes(&request.encode_to_vec()[..])
    }

    #[test]
    fn the_large_fields_do_not_count_and_the_rest_does() {
        let large = ServeRequest {
            namespace: "demo".into(),
            input: Some(prost_types::Any { type_url: "x".into(), value: vec![0; 9000] }),
            service_def: Some(ServiceDef::ServiceBinary(vec![0; 9000].into())),
            options: Some(ExecutionOptions {
                input_bytes: vec![0; 9000].into(),
                cpus: 1.0,
                memory_bytes: 1,
                ..ExecutionOptions::default()
            }),
            ..ServeRequest::default()
        };
        assert!(light(&large) < 50, "{}", light(&large));

        let args = ExecutionOptions { args: vec![String::new(); 1000], ..Default::default() };
        let many = ServeRequest { options: Some(args), ..ServeRequest::default() };
        assert!(light(&many) >= 2000);
        let uri = ServiceDef::ServiceUri("x".repeat(5000));
        let uri = ServeRequest { service_def: Some(uri), ..ServeRequest::default() };
        assert!(light(&uri) >= 5000);
    }

    proptest! {
        #[test]
        fn noise_counts_no_more_than_it_is(noise: Vec<u8>) {
            prop_assert!(light_bytes(&noise[..]) <= noise.len() as u64);
        }
    }
}
