//! The metadata of a GGUF file: typed values under keys. Strings and arrays stay where they are in
//! the file's bytes; a value of the wrong type is an error that names the key.

use std::collections::HashMap;
use std::ops::Range;

use super::cursor::Cursor;
use super::fault::{Entry, Fault, Malformed, Place, Region, printable};

/// ggml reads longer keys neither.
const MAX_KEY_BYTES: u64 = 65_535;
/// Chat templates and merges are far below.
const MAX_STRING_BYTES: u64 = 16 << 20;

/// The type of a value in the file; ids are GGUF's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

/// A value. Numbers are widened; ranges are of the file's bytes, checked when the file was opened.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(Range<usize>),
    Array { of: Type, len: usize, bytes: Range<usize> },
}

/// Keys and values of a file, without its bytes.
#[derive(Debug, Default)]
pub(super) struct Table {
    values: HashMap<String, Value>,
}

/// A metadata value that is missing or not of the type wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("metadata key `{key}` is missing")]
    Missing { key: String },
    #[error("metadata key `{key}` is {got}; it must be {wanted}")]
    WrongType { key: String, got: &'static str, wanted: &'static str },
    #[error("metadata key `{key}` is {got}; it must be {wanted}")]
    OutOfRange { key: String, got: String, wanted: &'static str },
}

/// Metadata with the bytes it lies in.
#[derive(Debug, Clone, Copy)]
pub struct Metadata<'a> {
    table: &'a Table,
    bytes: &'a [u8],
}

impl<'a> Metadata<'a> {
    pub(super) fn new(table: &'a Table, bytes: &'a [u8]) -> Self {
        Self { table, bytes }
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.values.contains_key(key)
    }

    /// # Errors
    /// The value is no string.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.table.values.get(key) {
            None => Ok(None),
            Some(Value::String(range)) => Ok(Some(self.text(range.clone()))),
            Some(other) => Err(other.is_not(key, "a string")),
        }
    }

    /// # Errors
    /// The value is no whole number, or below zero.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, Error> {
        match self.table.values.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(value)) => Ok(Some(*value)),
            Some(Value::Signed(value)) => {
                u64::try_from(*value).map(Some).map_err(|_| Error::OutOfRange {
                    key: key.to_owned(),
                    got: value.to_string(),
                    wanted: "at least 0",
                })
            }
            Some(other) => Err(other.is_not(key, "a whole number")),
        }
    }

    /// # Errors
    /// The value is no number.
    pub fn float(&self, key: &str) -> Result<Option<f32>, Error> {
        match self.table.values.get(key) {
            None => Ok(None),
            Some(Value::Float(value)) => Ok(Some(*value as f32)),
            Some(Value::Unsigned(value)) => Ok(Some(*value as f32)),
            Some(Value::Signed(value)) => Ok(Some(*value as f32)),
            Some(other) => Err(other.is_not(key, "a number")),
        }
    }

    /// # Errors
    /// The value is no boolean.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.table.values.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => Err(other.is_not(key, "a boolean")),
        }
    }

    /// # Errors
    /// The value is no array of strings.
    pub fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>, Error> {
        let (len, bytes) = match self.table.values.get(key) {
            None => return Ok(None),
            Some(Value::Array { of: Type::String, len, bytes }) => (*len, bytes.clone()),
            Some(other) => return Err(other.is_not(key, "an array of strings")),
        };
        let mut cursor = Cursor::new(&self.bytes[bytes.clone()]);
        let mut strings = Vec::with_capacity(len);
        for _ in 0..len {
            let range = cursor.string(MAX_STRING_BYTES).expect("checked when the file was opened");
            strings.push(self.text(bytes.start + range.start..bytes.start + range.end));
        }
        Ok(Some(strings))
    }

    /// # Errors
    /// The value is no array of 32-bit whole numbers.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        let wanted = "an array of 32-bit whole numbers";
        let (of, bytes) = match self.table.values.get(key) {
            None => return Ok(None),
            Some(Value::Array { of: of @ (Type::I32 | Type::U32), bytes, .. }) => {
                (*of, bytes.clone())
            }
            Some(other) => return Err(other.is_not(key, wanted)),
        };
        let signed = of == Type::I32;
        let (words, _) = self.bytes[bytes].as_chunks::<4>();
        let read = |word: &[u8; 4]| match signed {
            true => i64::from(i32::from_le_bytes(*word)),
            false => i64::from(u32::from_le_bytes(*word)),
        };
        Ok(Some(words.iter().map(read).collect()))
    }

    fn text(&self, range: Range<usize>) -> &'a str {
        std::str::from_utf8(&self.bytes[range]).expect("checked when the file was opened")
    }
}

/// Turns an absent value into an error that names the key.
///
/// # Errors
/// The value is absent.
pub fn required<T>(key: &str, value: Option<T>) -> Result<T, Error> {
    value.ok_or_else(|| Error::Missing { key: key.to_owned() })
}

impl Value {
    fn is_not(&self, key: &str, wanted: &'static str) -> Error {
        let got = match self {
            Self::Unsigned(_) | Self::Signed(_) => "a whole number",
            Self::Float(_) => "a floating-point number",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Array { of: Type::String, .. } => "an array of strings",
            Self::Array { .. } => "an array of other values",
        };
        Error::WrongType { key: printable(key), got, wanted }
    }
}

impl Table {
    /// Reads `n_entries` keys and values.
    pub(super) fn read(
        cursor: &mut Cursor<'_>,
        bytes: &[u8],
        n_entries: u64,
    ) -> Result<Self, Malformed> {
        let mut table = Self::default();
        for index in 0..n_entries {
            let mut entry = Entry::Index(index);
            let read = table.read_entry(cursor, bytes, &mut entry);
            read.map_err(|fault| {
                Place::new(Region::Metadata, Some(entry), cursor.at()).fault(fault)
            })?;
        }
        Ok(table)
    }

    fn read_entry(
        &mut self,
        cursor: &mut Cursor<'_>,
        bytes: &[u8],
        entry: &mut Entry,
    ) -> Result<(), Fault> {
        let key = cursor.string(MAX_KEY_BYTES)?;
        let key = std::str::from_utf8(&bytes[key]).map_err(|_| Fault::NotUtf8)?;
        *entry = Entry::named(key);
        let value = read_value(cursor)?;
        match self.values.insert(key.to_owned(), value) {
            None => Ok(()),
            Some(_) => Err(Fault::DuplicateKey),
        }
    }
}

fn read_value(cursor: &mut Cursor<'_>) -> Result<Value, Fault> {
    Ok(match read_type(cursor)? {
        Type::U8 => Value::Unsigned(cursor.u8()?.into()),
        Type::I8 => Value::Signed((cursor.u8()? as i8).into()),
        Type::U16 => Value::Unsigned(cursor.u16()?.into()),
        Type::I16 => Value::Signed((cursor.u16()? as i16).into()),
        Type::U32 => Value::Unsigned(cursor.u32()?.into()),
        Type::I32 => Value::Signed((cursor.u32()? as i32).into()),
        Type::U64 => Value::Unsigned(cursor.u64()?),
        Type::I64 => Value::Signed(cursor.u64()? as i64),
        Type::F32 => Value::Float(f32::from_bits(cursor.u32()?).into()),
        Type::F64 => Value::Float(f64::from_bits(cursor.u64()?)),
        Type::Bool => match cursor.u8()? {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            got => return Err(Fault::NotBool { got }),
        },
        Type::String => Value::String(cursor.string(MAX_STRING_BYTES)?),
        Type::Array => return read_array(cursor),
    })
}

fn read_array(cursor: &mut Cursor<'_>) -> Result<Value, Fault> {
    let of = read_type(cursor)?;
    let min_bytes = match of {
        Type::U8 | Type::I8 | Type::Bool => 1,
        Type::U16 | Type::I16 => 2,
        Type::U32 | Type::I32 | Type::F32 => 4,
        Type::U64 | Type::I64 | Type::F64 | Type::String => 8,
        Type::Array => return Err(Fault::NestedArray),
    };
    let len = cursor.count(min_bytes)?;
    let bytes = if of == Type::String {
        let start = cursor.at();
        for _ in 0..len {
            cursor.string(MAX_STRING_BYTES)?;
        }
        start..cursor.at()
    } else {
        cursor.take(len * min_bytes)?
    };
    Ok(Value::Array { of, len: len as usize, bytes })
}

fn read_type(cursor: &mut Cursor<'_>) -> Result<Type, Fault> {
    Ok(match cursor.u32()? {
        0 => Type::U8,
        1 => Type::I8,
        2 => Type::U16,
        3 => Type::I16,
        4 => Type::U32,
        5 => Type::I32,
        6 => Type::F32,
        7 => Type::Bool,
        8 => Type::String,
        9 => Type::Array,
        10 => Type::U64,
        11 => Type::I64,
        12 => Type::F64,
        id => return Err(Fault::ValueType { id }),
    })
}
