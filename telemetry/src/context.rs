//! Which span something belongs to: the ids of a sampled span, and their form on the wire, W3C's
//! `traceparent` (version 00) or six words of a step plan.

use std::fmt;

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// The ids of one span of a sampled trace; neither is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Context {
    trace: u128,
    span: u64,
}

/// What a `traceparent` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incoming {
    pub context: Context,
    pub sampled: bool,
}

impl Context {
    /// Of a new trace.
    #[must_use]
    pub fn root() -> Self {
        Self { trace: rand::random_range(1..=u128::MAX), span: new_span() }
    }

    /// Of a new span in the same trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span: new_span(), ..self }
    }

    /// As six words, low ones first.
    #[must_use]
    pub fn words(self) -> [u32; 6] {
        let trace: [u32; 4] = std::array::from_fn(|i| (self.trace >> (32 * i)) as u32);
        let [a, b, c, d] = trace;
        [a, b, c, d, self.span as u32, (self.span >> 32) as u32]
    }

    /// None if an id would be 0.
    #[must_use]
    pub fn from_words([a, b, c, d, low, high]: [u32; 6]) -> Option<Self> {
        let trace = [d, c, b, a].iter().fold(0, |trace, &word| trace << 32 | u128::from(word));
        let span = u64::from(high) << 32 | u64::from(low);
        (trace != 0 && span != 0).then_some(Self { trace, span })
    }

    pub(crate) fn span_id(self) -> SpanId {
        SpanId::from(self.span)
    }

    pub(crate) fn to_sdk(self) -> SpanContext {
        let (trace, flags) = (TraceId::from(self.trace), TraceFlags::SAMPLED);
        SpanContext::new(trace, self.span_id(), flags, false, TraceState::default())
    }
}

fn new_span() -> u64 {
    rand::random_range(1..=u64::MAX)
}

/// As a `traceparent` that says it is sampled.
impl fmt::Display for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-01", self.trace, self.span)
    }
}

impl Incoming {
    /// None of what is no `traceparent`: then there is no trace, as the standard wants it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (version, rest) = text.split_once('-')?;
        let mut parts = rest.split('-');
        let (trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?);
        // A later version may have more parts.
        let is_whole = parts.next().is_none() || version != "00";
        let version = hex(version, 2)?;
        if version == 0xff || !is_whole {
            return None;
        }
        let (trace, span) = (hex(trace, 32)?, hex(span, 16)? as u64);
        let sampled = hex(flags, 2)? & 1 == 1;
        (trace != 0 && span != 0).then_some(Self { context: Context { trace, span }, sampled })
    }
}

/// So many digits, lower case.
fn hex(text: &str, n_digits: usize) -> Option<u128> {
    let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let is_hex = text.len() == n_digits && text.bytes().all(is_digit);
    is_hex.then(|| u128::from_str_radix(text, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_written() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let read = Incoming::parse(text);
        assert_eq!(
            read.map(|read| (read.context.to_string(), read.sampled)),
            Some((text.into(), true))
        );
        let check = |text: &str, expect: Option<bool>| {
            assert_eq!(Incoming::parse(text).map(|read| read.sampled), expect, "{text}");
        };
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", Some(false));
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-03", Some(true));
        check("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", Some(true));
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", None);
        check("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None);
        check("00-00000000000000000000000000000000-b7ad6b7169203331-01", None);
        check("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None);
        check("00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None);
        check("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333-01", None);
        check("00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None);
        check("", None);
        check("00", None);
    }

    #[test]
    fn words_bring_back_the_context() {
        for _ in 0..100 {
            let context = Context::root().child();
            assert_eq!(Context::from_words(context.words()), Some(context));
        }
        assert_eq!(Context::from_words([0, 0, 0, 0, 1, 0]), None);
        assert_eq!(Context::from_words([1, 0, 0, 0, 0, 0]), None);
    }
}
