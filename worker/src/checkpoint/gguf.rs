//! A checked reader of GGUF files, versions 2 and 3: header, metadata, tensor table, data.
//!
//! Opening checks everything but the weights themselves; it reads no tensor data. It knows no
//! model. Layout: the GGUF specification of the ggml project.

use std::collections::HashMap;
use std::ops::Range;

use evener_kernels::quant::Format;

use super::bytes::FileBytes;
use super::cursor::Cursor;
use super::fault::{Entry, Fault, Malformed, Place, Region};
use super::metadata::{self, Metadata};

const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
const MAX_TENSOR_NAME_BYTES: u64 = 1024;
/// Key length, a byte of key, type, a byte of value; name length, dimensions, one of them, type,
/// offset.
const MIN_METADATA_BYTES: u64 = 8 + 1 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 8 + 4 + 8;

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub name: String,
    /// Rows, columns; `[1, n]` for a vector. Further dimensions count as rows.
    pub shape: [usize; 2],
    pub format: Format,
    /// In the file, row after row.
    pub bytes: Range<usize>,
}

/// A GGUF file that has been checked.
#[derive(Debug)]
pub struct Gguf {
    bytes: FileBytes,
    version: u32,
    metadata: metadata::Table,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
    /// Where header, metadata and tensor table end.
    table_end: usize,
}

impl Gguf {
    /// # Errors
    /// The first fault, with its place.
    pub fn parse(bytes: FileBytes) -> Result<Self, Malformed> {
        let mut cursor = Cursor::new(&bytes);
        let header = read_header(&mut cursor)
            .map_err(|fault| Place::new(Region::Header, None, cursor.at()).fault(fault))?;
        let metadata = metadata::Table::read(&mut cursor, &bytes, header.n_metadata)?;
        let alignment = alignment(Metadata::new(&metadata, &bytes)).map_err(|fault| {
            let entry = Entry::named(ALIGNMENT_KEY);
            Place::new(Region::Metadata, Some(entry), cursor.at()).fault(fault)
        })?;
        let rows = read_tensor_table(&mut cursor, &bytes, header.n_tensors)?;
        let table_end = cursor.at();
        let mut tensors = Vec::with_capacity(rows.len());
        for row in rows {
            let info = row.locate(table_end, alignment, bytes.len())?;
            tensors.push(info);
        }
        check_overlap(&tensors)?;
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Ok(Self { bytes, version: header.version, metadata, tensors, by_name, table_end })
    }

    pub fn version(&self) -> u32 {
        self.version
    }

    pub fn metadata(&self) -> Metadata<'_> {
        Metadata::new(&self.metadata, &self.bytes)
    }

    /// In the order of the file.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.tensors[index])
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where header, metadata and tensor table end; data follow, aligned.
    pub fn table_end(&self) -> usize {
        self.table_end
    }
}

struct Header {
    version: u32,
    n_tensors: u64,
    n_metadata: u64,
}

fn read_header(cursor: &mut Cursor<'_>) -> Result<Header, Fault> {
    let got = cursor.clone().magic()?;
    if got != *b"GGUF" {
        return Err(Fault::NotGguf { got });
    }
    cursor.magic()?;
    let got = cursor.clone().u32()?;
    if !(2..=3).contains(&got) {
        return Err(Fault::Version { got });
    }
    Ok(Header {
        version: cursor.u32()?,
        n_tensors: cursor.count(MIN_TENSOR_BYTES)?,
        n_metadata: cursor.count(MIN_METADATA_BYTES)?,
    })
}

const ALIGNMENT_KEY: &str = "general.alignment";

fn alignment(metadata: Metadata<'_>) -> Result<u64, Fault> {
    let wrong = |got| Fault::Alignment { got, max: MAX_ALIGNMENT };
    match metadata.unsigned(ALIGNMENT_KEY) {
        Ok(None) => Ok(DEFAULT_ALIGNMENT),
        Ok(Some(got)) if got > 0 && got.is_multiple_of(8) && got <= MAX_ALIGNMENT => Ok(got),
        Ok(Some(got)) => Err(wrong(got)),
        Err(_) => Err(wrong(0)),
    }
}

/// A row of the tensor table.
struct Row {
    name: String,
    at: usize,
    shape: [usize; 2],
    format: Format,
    n_bytes: u64,
    /// From the start of the data.
    offset: u64,
}

fn read_tensor_table(
    cursor: &mut Cursor<'_>,
    bytes: &[u8],
    n_tensors: u64,
) -> Result<Vec<Row>, Malformed> {
    let mut rows: Vec<Row> = Vec::new();
    let mut names = std::collections::HashSet::new();
    for index in 0..n_tensors {
        let mut entry = Entry::Index(index);
        let start = cursor.at();
        let row = read_row(cursor, bytes, &mut entry).and_then(|row| {
            if names.insert(row.name.clone()) { Ok(row) } else { Err(Fault::DuplicateTensor) }
        });
        let row = row.map_err(|fault| {
            Place::new(Region::TensorTable, Some(entry), cursor.at()).fault(fault)
        })?;
        rows.push(Row { at: start, ..row });
    }
    Ok(rows)
}

fn read_row(cursor: &mut Cursor<'_>, bytes: &[u8], entry: &mut Entry) -> Result<Row, Fault> {
    let at = cursor.at();
    let name = cursor.string(MAX_TENSOR_NAME_BYTES)?;
    let name = std::str::from_utf8(&bytes[name]).map_err(|_| Fault::NotUtf8)?.to_owned();
    *entry = Entry::named(&name);
    let n_dimensions = cursor.clone().u32()?;
    if !(1..=4).contains(&n_dimensions) {
        return Err(Fault::Dimensions { got: n_dimensions });
    }
    cursor.u32()?;
    let mut dimensions = Vec::with_capacity(4);
    for index in 0..n_dimensions {
        let dimension = cursor.clone().u64()?;
        if dimension == 0 {
            return Err(Fault::EmptyDimension { index });
        }
        dimensions.push(cursor.u64()?);
    }
    let id = cursor.clone().u32()?;
    let format = Format::from_ggml(id).ok_or_else(|| Fault::TensorFormat {
        id,
        supported: Format::ALL.map(Format::name).join(", "),
    })?;
    cursor.u32()?;
    let (shape, n_bytes) = shape_and_size(&dimensions, format)?;
    Ok(Row { name, at, shape, format, n_bytes, offset: cursor.u64()? })
}

/// The file lists the fastest dimension first.
fn shape_and_size(dimensions: &[u64], format: Format) -> Result<([usize; 2], u64), Fault> {
    let overflow = || Fault::ShapeOverflow { dimensions: dimensions.to_vec() };
    let columns = dimensions[0];
    let rows = dimensions[1..].iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let rows = rows.ok_or_else(overflow)?;
    let block = format.block_len() as u64;
    if !columns.is_multiple_of(block) {
        return Err(Fault::PartialBlock { columns, format: format.name(), block });
    }
    let n_bytes = (columns / block)
        .checked_mul(format.block_bytes() as u64)
        .and_then(|row| row.checked_mul(rows))
        .filter(|&n| n <= isize::MAX as u64)
        .ok_or_else(overflow)?;
    // Below isize::MAX bytes, rows and columns fit a usize too: a weight takes more than half a
    // byte.
    let shape = [usize::try_from(rows), usize::try_from(columns)];
    let [Ok(rows), Ok(columns)] = shape else { return Err(overflow()) };
    rows.checked_mul(columns).ok_or_else(overflow)?;
    Ok(([rows, columns], n_bytes))
}

impl Row {
    fn locate(
        self,
        table_end: usize,
        alignment: u64,
        file_len: usize,
    ) -> Result<TensorInfo, Malformed> {
        let fail = |region, offset, fault| {
            Err(Place::new(region, Some(Entry::named(&self.name)), offset).fault(fault))
        };
        if !self.offset.is_multiple_of(alignment) {
            let fault = Fault::Misaligned { offset: self.offset, alignment };
            return fail(Region::TensorTable, self.at, fault);
        }
        let data_start = (table_end as u64).next_multiple_of(alignment);
        let start = data_start.saturating_add(self.offset);
        let end = start.saturating_add(self.n_bytes);
        if end > file_len as u64 {
            let fault = Fault::PastEnd { size: self.n_bytes, past: end - file_len as u64 };
            return fail(Region::Data, usize::try_from(start).unwrap_or(usize::MAX), fault);
        }
        let bytes = start as usize..end as usize;
        Ok(TensorInfo { name: self.name, shape: self.shape, format: self.format, bytes })
    }
}

fn check_overlap(tensors: &[TensorInfo]) -> Result<(), Malformed> {
    let mut by_offset: Vec<&TensorInfo> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| (tensor.bytes.start, tensor.bytes.end));
    for pair in by_offset.windows(2) {
        let [before, after] = [pair[0], pair[1]];
        if after.bytes.start < before.bytes.end {
            let other = super::fault::printable(&before.name);
            let entry = Some(Entry::named(&after.name));
            let place = Place::new(Region::Data, entry, after.bytes.start);
            return Err(place.fault(Fault::Overlap { other }));
        }
    }
    Ok(())
}
