//! What a view of rekey.create_view shows, read from the view itself.
//!
//! Called by src/api/views.rs. The stored query names table, columns and contexts by number: it
//! follows renames, and a dump and restore. Nothing is remembered beside it that could differ.

use std::ffi::c_int;

use pgrx::pg_sys::{self, Oid};

use super::expression::Expression;
use super::{text, types};
use crate::error::Result;

/// BTEqualStrategyNumber (src/include/access/stratnum.h).
const EQUALITY: i16 = 3;

/// A column of the view.
pub struct Shown {
    /// Number of the table's column.
    pub attnum: i16,
    /// Type that the view shows.
    pub type_oid: Oid,
    /// How a sealed column is opened; None for a column that is shown as it is.
    pub sealed: Option<Sealed>,
}

/// An opened column.
pub struct Sealed {
    /// The context over the row of the table; None when there is none.
    pub context: Option<Expression>,
}

/// Table and columns of an open view, in the order of the view; None when its query is another one
/// than create_view writes. Expressions live in the current memory context.
pub fn columns(view: pg_sys::Relation) -> Result<Option<(Oid, Vec<Shown>)>> {
    // SAFETY: the view is open; each cast follows the node's tag. Expressions are made of copies.
    unsafe {
        let query = pg_sys::get_view_query(view);
        let from = pgrx::PgList::<pg_sys::Node>::from_pg((*(*query).jointree).fromlist);
        let (1, Some(from)) = (from.len(), from.get_ptr(0)) else {
            return Ok(None);
        };
        if (*from).type_ != pg_sys::NodeTag::T_RangeTblRef {
            return Ok(None);
        }
        let index = (*from.cast::<pg_sys::RangeTblRef>()).rtindex;
        let at = usize::try_from(index - 1).unwrap_or(0);
        let entries = pgrx::PgList::<pg_sys::RangeTblEntry>::from_pg((*query).rtable);
        let Some(entry) = entries.get_ptr(at) else {
            return Ok(None);
        };
        if (*entry).rtekind != pg_sys::RTEKind::RTE_RELATION {
            return Ok(None);
        }
        let mut shown = Vec::new();
        let targets = pgrx::PgList::<pg_sys::TargetEntry>::from_pg((*query).targetList);
        for target in targets.iter_ptr().filter(|target| !(**target).resjunk) {
            let expression: *mut pg_sys::Node = (*target).expr.cast();
            let Some((attnum, sealed)) = column(expression, index)? else {
                return Ok(None);
            };
            shown.push(Shown {
                attnum,
                type_oid: pg_sys::exprType(expression),
                sealed,
            });
        }
        Ok(Some(((*entry).relid, shown)))
    }
}

/// # Safety
/// `node` is an expression of a stored query.
unsafe fn column(node: *mut pg_sys::Node, index: c_int) -> Result<Option<(i16, Option<Sealed>)>> {
    // SAFETY: promised by the caller.
    unsafe {
        if let Some(attnum) = plain(node, index) {
            return Ok(Some((attnum, None)));
        }
        if (*node).type_ != pg_sys::NodeTag::T_FuncExpr {
            return Ok(None);
        }
        let call: *mut pg_sys::FuncExpr = node.cast();
        if super::scan::verb((*call).funcid).as_deref() != Some("decrypt_col_as") {
            return Ok(None);
        }
        let args = pgrx::PgList::<pg_sys::Node>::from_pg((*call).args);
        let envelope = args.get_ptr(0).and_then(|arg| plain(arg, index));
        let context = args
            .get_ptr(2)
            .map(|node| Expression::of_node(node))
            .transpose()?;
        Ok(envelope.map(|attnum| (attnum, Some(Sealed { context }))))
    }
}

/// The column that an expression is, apart from a domain that is taken off.
///
/// # Safety
/// `node` is an expression of a stored query.
unsafe fn plain(mut node: *mut pg_sys::Node, index: c_int) -> Option<i16> {
    // SAFETY: promised by the caller.
    unsafe {
        while (*node).type_ == pg_sys::NodeTag::T_RelabelType {
            node = (*node.cast::<pg_sys::RelabelType>()).arg.cast();
        }
        if (*node).type_ != pg_sys::NodeTag::T_Var {
            return None;
        }
        let var = &*node.cast::<pg_sys::Var>();
        (var.varno as c_int == index && var.varlevelsup == 0 && var.varattno > 0)
            .then_some(var.varattno)
    }
}

/// The table beneath a view, open for reading; closed when dropped, the lock stays.
pub struct Beneath(pg_sys::Relation);

impl Beneath {
    /// Opens it. Raises when it is gone.
    pub fn open(oid: Oid) -> Beneath {
        // SAFETY: locks, and raises for an OID that is no relation.
        Beneath(unsafe { pg_sys::relation_open(oid, pg_sys::AccessShareLock as i32) })
    }

    /// Its primary key, none without one that is checked at once.
    pub fn key(&self) -> Vec<KeyColumn> {
        // SAFETY: open; making the list of indexes sets rd_pkindex. The index is open while its
        // arrays, which have as many elements as it has key columns, are read.
        unsafe {
            pg_sys::list_free(pg_sys::RelationGetIndexList(self.0));
            let primary = (*self.0).rd_pkindex;
            if primary == pg_sys::InvalidOid {
                return Vec::new();
            }
            let index = pg_sys::index_open(primary, pg_sys::AccessShareLock as i32);
            let row = (*index).rd_index;
            let count = usize::try_from((*row).indnkeyatts).unwrap_or(0);
            let attnums = (*row).indkey.values.as_slice(count);
            let key = attnums.iter().enumerate().map(|(at, attnum)| {
                let of = *(*index).rd_opcintype.add(at);
                let family = *(*index).rd_opfamily.add(at);
                let operator = pg_sys::get_opfamily_member(family, of, of, EQUALITY);
                KeyColumn::of(*attnum, operator, of)
            });
            let key: Option<_> = key.collect();
            pg_sys::index_close(index, pg_sys::NoLock as i32);
            key.unwrap_or_default()
        }
    }

    /// What gives an identity column its next value, without asking for a privilege on the
    /// sequence, as an INSERT that leaves the column out.
    pub fn next_value(&self, attnum: i16) -> Result<Option<Expression>> {
        // SAFETY: open; a fresh node or NULL.
        unsafe {
            let node = pg_sys::build_column_default(self.0, attnum.into());
            (!node.is_null())
                .then(|| Expression::of_node(node))
                .transpose()
        }
    }

    /// A row of the table to be filled by hand, in the current memory context.
    pub fn row(&self) -> Row {
        // SAFETY: the copy of the descriptor is not counted: it lives as its memory context.
        unsafe {
            let desc = pg_sys::CreateTupleDescCopy((*self.0).rd_att);
            Row(pg_sys::MakeSingleTupleTableSlot(
                desc,
                &raw const pg_sys::TTSOpsVirtual,
            ))
        }
    }
}

impl Drop for Beneath {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            // SAFETY: opened by `open`, closed once.
            unsafe { pg_sys::relation_close(self.0, pg_sys::NoLock as i32) }
        }
    }
}

/// A column of a primary key.
pub struct KeyColumn {
    /// Its number in the table.
    pub attnum: i16,
    /// The equality of the index, qualified.
    pub operator: String,
    /// What makes its operands of the type that it is for, so that it is the one that is meant:
    /// anybody may make others of its name beside it. Empty for a built-in operator.
    pub cast: String,
}

impl KeyColumn {
    /// None for an operator class without an equality.
    fn of(attnum: i16, operator: Oid, type_oid: Oid) -> Option<KeyColumn> {
        let pg_catalog = Oid::from(pg_sys::PG_CATALOG_NAMESPACE);
        // SAFETY: GETSTRUCT is the cached row, which is read before its release. The names are
        // fresh C strings.
        unsafe {
            let cache = pg_sys::SysCacheIdentifier::OPEROID as c_int;
            let tuple = pg_sys::SearchSysCache1(cache, pg_sys::Datum::from(operator));
            if tuple.is_null() {
                return None;
            }
            let row = pg_sys::GETSTRUCT(tuple).cast::<pg_sys::FormData_pg_operator>();
            let namespace = (*row).oprnamespace;
            let name = (*row).oprname;
            pg_sys::ReleaseSysCache(tuple);
            let schema = pg_sys::quote_identifier(pg_sys::get_namespace_name(namespace));
            let schema = text::c_string(schema);
            let polymorphic = pg_sys::get_typtype(type_oid) as u8 == pg_sys::TYPTYPE_PSEUDO;
            let cast = if namespace == pg_catalog || polymorphic {
                String::new()
            } else {
                format!("::{}", types::qualified_name(type_oid))
            };
            let name = text::c_string(name.data.as_ptr());
            Some(KeyColumn {
                attnum,
                operator: format!("{schema}.{name}"),
                cast,
            })
        }
    }
}

/// A row that never was in the table, for expressions over it.
pub struct Row(*mut pg_sys::TupleTableSlot);

impl Row {
    /// Puts these values in, and NULL in every other column. They live on their own.
    pub fn fill(
        &self,
        values: impl IntoIterator<Item = (i16, Option<pg_sys::Datum>)>,
    ) -> *mut pg_sys::TupleTableSlot {
        // SAFETY: the slot is virtual; attnums are those of live columns of its descriptor.
        unsafe {
            pg_sys::ExecClearTuple(self.0);
            let count = usize::try_from((*(*self.0).tts_tupleDescriptor).natts).unwrap_or(0);
            for at in 0..count {
                *(*self.0).tts_isnull.add(at) = true;
            }
            for (attnum, value) in values {
                let at = usize::from(attnum.unsigned_abs()) - 1;
                if let Some(datum) = value.filter(|_| at < count) {
                    *(*self.0).tts_values.add(at) = datum;
                    *(*self.0).tts_isnull.add(at) = false;
                }
            }
            pg_sys::ExecStoreVirtualTuple(self.0)
        }
    }
}
