//! What is wrong with the bytes of a checkpoint, and where: a refusal names the place in the file.

use std::fmt;

/// The parts of a GGUF file, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    Header,
    Metadata,
    TensorTable,
    Data,
}

/// What an item of a region is known by: its name once that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    Index(u64),
    Name(String),
}

/// Where in a file something is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub region: Region,
    pub entry: Option<Entry>,
    /// Bytes from the start of the file.
    pub offset: u64,
}

/// What is wrong there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{needed} more bytes are needed, {left} are left: the file is truncated or corrupt")]
    Truncated { needed: u64, left: u64 },
    #[error("the file begins with {}, not with \"GGUF\": it is no GGUF file", got.escape_ascii())]
    NotGguf { got: [u8; 4] },
    #[error("version {got} is not supported; 2 and 3, little-endian, are")]
    Version { got: u32 },
    #[error("a count of {count} cannot be: the bytes left hold at most {fits}")]
    TooMany { count: u64, fits: u64 },
    #[error("a string of {len} bytes; at most {max} are allowed here")]
    LongString { len: u64, max: u64 },
    #[error("a string is not UTF-8")]
    NotUtf8,
    #[error("value type {id} is unknown; 0 to 12 are known")]
    ValueType { id: u32 },
    #[error("an array of arrays; only arrays of numbers, booleans and strings are known")]
    NestedArray,
    #[error("a boolean is {got}; it must be 0 or 1")]
    NotBool { got: u8 },
    #[error("the key appears twice")]
    DuplicateKey,
    #[error("general.alignment is {got}; it must be a multiple of 8 and at most {max}")]
    Alignment { got: u64, max: u64 },
    #[error("the name appears twice")]
    DuplicateTensor,
    #[error("{got} dimensions; 1 to 4 are known")]
    Dimensions { got: u32 },
    #[error("dimension {index} is 0")]
    EmptyDimension { index: u32 },
    #[error("the product of the dimensions {dimensions:?} overflows")]
    ShapeOverflow { dimensions: Vec<u64> },
    #[error("ggml type {id} is not supported; supported are {supported}")]
    TensorFormat { id: u32, supported: String },
    #[error("{columns} columns are not whole {format} blocks of {block}")]
    PartialBlock { columns: u64, format: &'static str, block: u64 },
    #[error("its data begins at {offset}, which is not a multiple of {alignment}")]
    Misaligned { offset: u64, alignment: u64 },
    #[error("its {size} bytes end {past} bytes past the end of the file")]
    PastEnd { size: u64, past: u64 },
    #[error("its data overlaps that of {other}")]
    Overlap { other: String },
}

/// A fault and its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {fault}")]
pub struct Malformed {
    pub place: Place,
    pub fault: Fault,
}

impl Place {
    pub(super) fn new(region: Region, entry: Option<Entry>, offset: usize) -> Self {
        Self { region, entry, offset: offset as u64 }
    }

    pub(super) fn fault(self, fault: Fault) -> Malformed {
        Malformed { place: self, fault }
    }
}

impl Entry {
    /// A name as it is safe to print: cut, control characters escaped.
    pub(super) fn named(name: &str) -> Self {
        Self::Name(printable(name))
    }
}

/// Names come from the file: cut and escaped before people see them.
pub(super) fn printable(name: &str) -> String {
    const MAX_CHARS: usize = 80;
    let mut text: String = name.chars().take(MAX_CHARS).flat_map(char::escape_debug).collect();
    if name.chars().nth(MAX_CHARS).is_some() {
        text.push_str("...");
    }
    text
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let item = match self.region {
            Region::Header => "header",
            Region::Metadata => "metadata key",
            Region::TensorTable => "tensor table, tensor",
            Region::Data => "data of tensor",
        };
        match &self.entry {
            Some(Entry::Name(name)) => write!(f, "{item} `{name}`, byte {}", self.offset),
            Some(Entry::Index(index)) => write!(f, "{item} #{index}, byte {}", self.offset),
            None => write!(f, "{item}, byte {}", self.offset),
        }
    }
}
