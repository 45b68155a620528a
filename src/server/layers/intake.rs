//! A message as it comes. It is kept in one piece, but for a large executable: that
//! goes into a memfd, piece by piece, and is never in memory as a whole.
//!
//! Only what the decoder would see the same way is taken out: the first large
//! `service_binary` of a Serve message that is not compressed and is long enough
//! for it. Everything else is left to the decoder, which says what is wrong with it.

use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::{
    fill::{Filler, Fillers},
    scan::{Found, has_executable, key, light_bytes, only_binary},
};
use crate::call::Sealed;

/// A gRPC message's flag and length.
pub(super) const PREFIX: usize = 5;

/// What of a request is decoded here already.
#[derive(Clone, Debug)]
pub struct Lifted {
    /// The executable.
    pub binary: Bytes,
    /// What holds it, if it was put there as it came.
    pub sealed: Option<Sealed>,
}

/// What has come of a message.
#[derive(Debug)]
pub(super) struct Intake {
    /// All of it but the bytes of the executable that is taken out.
    left: BytesMut,
    /// How many bytes came, wherever they are now.
    arrived: u64,
    lifting: Lifting,
}

/// What becomes of the executable.
#[derive(Debug)]
enum Lifting {
    /// None was seen in the fields before this place.
    Looking(usize),
    /// Its field begins at this place; the filler has what came of it.
    Taking(usize, Filler),
    /// All of it came. Its field began at this place, with a head of so many bytes,
    /// which is taken out as well.
    Taken(usize, usize, Filler),
    /// It stays where it is.
    Never,
}

impl Intake {
    /// Nothing yet. `may_lift`: it is a Serve message.
    pub(super) fn new(may_lift: bool) -> Self {
        let lifting = if may_lift { Lifting::Looking(PREFIX) } else { Lifting::Never };
        Self { left: BytesMut::new(), arrived: 0, lifting }
    }

    /// How many bytes came.
    pub(super) fn len(&self) -> u64 {
        self.arrived
    }

    /// The length that the prefix announces, once it is there.
    pub(super) fn announced(&self) -> Option<u64> {
        let (prefix, _) = self.left.split_first_chunk::<PREFIX>()?;
        let [_, a, b, c, d] = *prefix;
        Some(u64::from(u32::from_be_bytes([a, b, c, d])))
    }

    /// Takes what came next.
    ///
    /// # Errors
    /// Those of memfd_create(2) and write(2).
    pub(super) async fn put(&mut self, data: &[u8]) -> io::Result<()> {
        self.arrived += data.len() as u64;
        self.add(data).await
    }

    async fn add(&mut self, data: &[u8]) -> io::Result<()> {
        let mut rest = data;
        if let Lifting::Taking(_, filler) = &mut self.lifting {
            rest = filler.put(rest).await?;
            if filler.missing() == 0 {
                self.taken();
            }
        }
        self.left.extend_from_slice(rest);
        Ok(())
    }

    /// Its field's head isn't needed any more: the decoder never sees this field.
    fn taken(&mut self) {
        self.lifting = match std::mem::replace(&mut self.lifting, Lifting::Never) {
            Lifting::Taking(field, filler) => {
                let head = self.left.len() - field;
                self.left.truncate(field);
                Lifting::Taken(field, head, filler)
            }
            other => other,
        };
    }

    /// Looks for a large executable in what came, and begins to take it out.
    ///
    /// # Errors
    /// Those of [`Intake::put`].
    pub(super) async fn look(&mut self, fillers: &Fillers) -> io::Result<()> {
        let Some((field, start, length)) = self.find(fillers.large) else { return Ok(()) };
        if self.left.len() - start < fillers.piece {
            return Ok(());
        }
        let Some(filler) = fillers.begin(length)? else {
            self.lifting = Lifting::Never;
            return Ok(());
        };
        let content = self.left.split_off(start);
        self.left = BytesMut::from(&self.left[..]);
        self.lifting = Lifting::Taking(field, filler);
        self.add(&content).await
    }

    /// Where the field of a large executable begins, and its content, and the
    /// content's length.
    fn find(&mut self, large: usize) -> Option<(usize, usize, usize)> {
        let Lifting::Looking(next) = &mut self.lifting else { return None };
        let prefix = self.left.get(..PREFIX)?;
        let announced = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
        let whole = PREFIX.saturating_add(usize::try_from(announced).ok()?);
        let is_plain = prefix[0] == 0;
        while let Some(key) = self.left.get(*next..).and_then(key) {
            let start = *next + key.length;
            let end = start.checked_add(key.content).filter(|end| is_plain && *end <= whole);
            let Some(end) = end else { break };
            if key.field == 6 && key.is_bytes && key.content >= large {
                return (start <= self.left.len()).then_some((*next, start, key.content));
            }
            if end > self.left.len() {
                return None;
            }
            *next = end;
        }
        None
    }

    /// How many bytes are neither executable nor input, of what is well-formed.
    pub(super) fn light(&self) -> u64 {
        let content = self.left.get(PREFIX..).unwrap_or_default();
        let taken = match &self.lifting {
            Lifting::Looking(_) | Lifting::Never => 0,
            Lifting::Taken(_, head, _) => *head as u64,
            // Half an executable is none.
            Lifting::Taking(..) => self.arrived - self.left.len() as u64,
        };
        light_bytes(content) + taken
    }

    /// What is left to decode, and what need not be: so the executable isn't copied.
    ///
    /// # Errors
    /// Those of [`Intake::put`], and of sealing the executable.
    pub(super) async fn finish(mut self, serve: bool) -> io::Result<(Bytes, Option<Lifted>)> {
        let is_cut =
            self.announced().is_none_or(|announced| self.len() < announced + PREFIX as u64);
        match self.lifting {
            Lifting::Taken(field, head, filler) if !is_cut => {
                let (binary, sealed) = filler.finish().await?;
                shorten(&mut self.left, head + binary.len());
                let message = self.left.freeze();
                let lifted = Lifted { binary, sealed: Some(sealed) };
                // Another one after it would take its place, and the decoder knows.
                let is_last = !has_executable(after(&message, field));
                Ok((message, is_last.then_some(lifted)))
            }
            // The decoder finds some of a message, but less than the prefix says.
            Lifting::Taking(..) | Lifting::Taken(..) => {
                if self.left.len() == PREFIX {
                    self.left.put_u8(0);
                }
                Ok((self.left.freeze(), None))
            }
            Lifting::Looking(_) | Lifting::Never => {
                let message = self.left.freeze();
                Ok(match lift(&message).filter(|_| serve) {
                    Some((left, lifted)) => (left, Some(lifted)),
                    None => (message, None),
                })
            }
        }
    }
}

/// Has a message's prefix announce so many bytes less.
fn shorten(message: &mut BytesMut, by: usize) {
    if let Some(length) = message.get_mut(1..PREFIX) {
        let announced = u32::from_be_bytes([length[0], length[1], length[2], length[3]]);
        let by = u32::try_from(by).unwrap_or(u32::MAX);
        length.copy_from_slice(&announced.saturating_sub(by).to_be_bytes());
    }
}

/// What there is of the first message's content from this place on.
fn after(message: &Bytes, from: usize) -> Bytes {
    let announced = message.get(1..PREFIX).map_or(0, |length| {
        usize::try_from(u32::from_be_bytes([length[0], length[1], length[2], length[3]]))
            .unwrap_or(usize::MAX)
    });
    let end = PREFIX.saturating_add(announced).min(message.len());
    message.slice(from.min(end)..end)
}

/// Takes the executable out of a Serve message that is there in whole, so that the
/// decoder need not copy it: what is left to decode, and the executable. `None` where
/// the message is not just one, uncompressed, with one executable; the decoder sees
/// to those in whole.
fn lift(message: &Bytes) -> Option<(Bytes, Lifted)> {
    let (prefix, _) = message.split_first_chunk::<PREFIX>()?;
    let content = message.slice(PREFIX..);
    let announced = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
    if prefix[0] != 0 || content.len() != usize::try_from(announced).ok()? {
        return None;
    }
    let Found { field, binary } = only_binary(content.clone())?;
    let rest = content.len() - field.len();
    let mut left = BytesMut::with_capacity(PREFIX + rest);
    left.put_u8(0);
    left.put_u32(u32::try_from(rest).ok()?);
    left.extend_from_slice(&content[..field.start]);
    left.extend_from_slice(&content[field.end..]);
    Some((left.freeze(), Lifted { binary: content.slice(binary), sealed: None }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;
    use tonic::{Code, Streaming, body::Body, codec::Codec as _};
    use tonic_prost::ProstCodec;

    use super::*;
    use crate::{
        names::Digest,
        sys::SealedBytes,
        wire::{ServeRequest, serve_request::ServiceDef},
    };

    const LARGE: usize = 100;
    const PIECE: usize = 30;

    fn framed(flag: u8, announced: usize, content: &[u8]) -> Vec<u8> {
        let mut whole = vec![flag];
        whole.extend(u32::try_from(announced).unwrap().to_be_bytes());
        whole.extend(content);
        whole
    }

    fn request(source: ServiceDef) -> ServeRequest {
        let options =
            crate::wire::ExecutionOptions { args: vec!["a".into()], ..Default::default() };
        ServeRequest {
            namespace: "n".into(),
            method_name: "m".into(),
            options: Some(options),
            service_def: Some(source),
            ..ServeRequest::default()
        }
    }

    fn with(binary: &[u8]) -> Vec<u8> {
        request(ServiceDef::ServiceBinary(binary.to_vec().into())).encode_to_vec()
    }

    /// What tonic makes of the messages in some bytes, and of what is wrong with them.
    async fn decoded(bytes: Bytes) -> (Vec<ServeRequest>, Option<(Code, String)>) {
        let body = Body::new(http_body_util::Full::new(bytes));
        let decoder = ProstCodec::<ServeRequest, ServeRequest>::default().decoder();
        let mut stream = Streaming::new_request(decoder, body, None, None);
        let mut requests = Vec::new();
        loop {
            match stream.message().await {
                Ok(Some(request)) => requests.push(request),
                Ok(None) => return (requests, None),
                Err(status) => return (requests, Some((status.code(), status.message().into()))),
            }
        }
    }

    /// Takes a message in by steps; whether its executable was taken out, and came to
    /// be in a memfd. What is decoded is what would be decoded of the whole.
    async fn check(whole: &[u8], step: usize, places: usize) -> Option<bool> {
        let fillers = Fillers::new(places, LARGE, PIECE);
        let mut intake = Intake::new(true);
        for piece in whole.chunks(step) {
            intake.put(piece).await.unwrap();
            intake.look(&fillers).await.unwrap();
        }
        assert_eq!(intake.len(), whole.len() as u64);
        assert_eq!(intake.light(), light_bytes(whole.get(PREFIX..).unwrap_or_default()));
        let (left, lifted) = intake.finish(true).await.unwrap();
        assert_eq!(fillers.free(), places);

        let expected = decoded(Bytes::copy_from_slice(whole)).await;
        let mut found = decoded(left).await;
        let lifted = lifted.map(|Lifted { binary, sealed }| {
            if let Some(sealed) = &sealed {
                assert_eq!(sealed.digest, Digest::of(&binary));
                assert_eq!(SealedBytes::of(&sealed.memory).unwrap().as_ref(), binary);
            }
            if let Some(first) = found.0.first_mut() {
                first.service_def = Some(ServiceDef::ServiceBinary(binary));
            }
            sealed.is_some()
        });
        assert_eq!(found, expected);
        lifted
    }

    #[tokio::test]
    async fn an_executable_is_taken_out() {
        for (length, sealed) in [(0, false), (LARGE - 1, false), (LARGE, true), (5000, true)] {
            let content = with(&vec![7; length]);
            let whole = framed(0, content.len(), &content);
            for step in [1, 7, PIECE, 10_000] {
                assert_eq!(check(&whole, step, 1).await, Some(sealed), "{length} by {step}");
                assert_eq!(check(&whole, step, 0).await, Some(false), "there is no place");
            }
        }
    }

    #[tokio::test]
    async fn the_decoder_sees_to_what_is_odd() {
        let large = with(&[7; 500]);
        let uri = request(ServiceDef::ServiceUri("sha256:0".into())).encode_to_vec();
        let twice = [&large[..], &with(b"other")].concat();
        let then_uri = [&large[..], &uri].concat();
        let damaged = [&large[..], &[0xff]].concat();
        for content in [&twice, &then_uri, &damaged, &uri] {
            assert_eq!(check(&framed(0, content.len(), content), 10, 1).await, None);
        }
        // The last one counts: it is the large one.
        let second = [&with(b"other")[..], &large].concat();
        assert_eq!(check(&framed(0, second.len(), &second), 10, 1).await, Some(true));
        // Two messages: the second one is none of ours.
        let both = [framed(0, large.len(), &large), framed(0, uri.len(), &uri)].concat();
        assert_eq!(check(&both, 10, 1).await, Some(true));
        // Flags, and a message that ends before its executable, or goes on after it.
        assert_eq!(check(&framed(1, large.len(), &large), 10, 1).await, None);
        assert_eq!(check(&framed(7, large.len(), &large), 10, 1).await, None);
        assert_eq!(check(&framed(0, large.len() - 1, &large), 10, 1).await, None);
        check(&framed(0, large.len() + 1, &large), 10, 1).await;
        // One of which nothing is left but its prefix.
        let alone = ServeRequest {
            service_def: Some(ServiceDef::ServiceBinary(vec![7; 500].into())),
            ..ServeRequest::default()
        };
        let alone = alone.encode_to_vec();
        assert_eq!(check(&framed(0, alone.len(), &alone), 10, 1).await, Some(true));
        assert_eq!(check(&framed(0, alone.len() + 1, &alone), 10, 1).await, None);
        for length in 0..large.len() {
            let cut = &framed(0, large.len(), &large)[..length];
            assert_eq!(check(cut, 10, 1).await, None, "{length}");
        }
    }

    #[tokio::test]
    async fn other_messages_stay_as_they_are() {
        let large = with(&[7; 500]);
        let whole = framed(0, large.len(), &large);
        let mut intake = Intake::new(false);
        intake.put(&whole).await.unwrap();
        intake.look(&Fillers::new(1, LARGE, PIECE)).await.unwrap();
        let (left, lifted) = intake.finish(false).await.unwrap();
        assert!(lifted.is_none());
        assert_eq!(left, whole);
    }

    proptest! {
        #[test]
        fn whatever_comes_is_decoded_as_a_whole_would_be(
            fields in proptest::collection::vec((0_u8..8, 0_u8..6, 0_usize..300), 0..6),
            surplus in -5_isize..5,
            cut in 0_usize..1000,
            step in 1_usize..200,
        ) {
            let mut content = Vec::new();
            for (number, kind, length) in fields {
                content.push(number << 3 | kind);
                if kind == 2 {
                    prost::encode_length_delimiter(length, &mut content).unwrap();
                }
                content.extend((0..length).map(|index| (index % 7) as u8));
            }
            let announced = content.len().saturating_add_signed(surplus);
            let mut whole = framed(0, announced, &content);
            whole.truncate(whole.len().saturating_sub(cut.saturating_sub(500)));
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(check(&whole, step, 1));
        }

        #[test]
        fn executables_of_all_lengths_come_through(
            lengths in proptest::collection::vec(0_usize..300, 1..3),
            announced in 0_usize..700,
            is_right: bool,
            cut in 0_usize..700,
            is_whole: bool,
            step in 1_usize..200,
        ) {
            let content: Vec<u8> = lengths.iter().flat_map(|length| with(&vec![7; *length])).collect();
            let announced = if is_right { content.len() } else { announced };
            let mut whole = framed(0, announced, &content);
            if !is_whole {
                whole.truncate(cut);
            }
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(check(&whole, step, 1));
        }
    }
}
