// The bundle's model through LiteRT, written from manifest.json. Not compiled where it was written.
// Gradle: implementation("com.google.ai.edge.litert:litert:{{version}}"), the version that the self-test passed with. Put the
// folder model/ into src/main/assets.
import android.content.Context
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.TensorBuffer

class Model(context: Context) : AutoCloseable {
    private val model = CompiledModel.create(context.assets, "{{model}}", CompiledModel.Options(Accelerator.CPU))

    /** One output for one row of token ids, by the shortest graph that holds it; zeros fill what is left. */
    fun run(ids: Map<String, LongArray>, output: String): FloatArray {
        val (signature, length) = SIGNATURES.first { (_, length) -> length >= ids.values.first().size }
        val feed = INPUTS.associateWith { name ->
            val row = ids.getValue(name)
            val filled = IntArray(length) { if (it < row.size) row[it].toInt() else 0 }
            model.createInputBuffer(name, signature).also { it.writeInt(filled) }
        }
        return run(feed, output, signature)
    }

    /** One output for one row of floats. */
    fun run(input: String, values: FloatArray, shape: LongArray, output: String): FloatArray {
        val signature = SIGNATURES.first().first
        return run(mapOf(input to model.createInputBuffer(input, signature).also { it.writeFloat(values) }), output, signature)
    }

    private fun run(feed: Map<String, TensorBuffer>, output: String, signature: String): FloatArray {
        val found = model.createOutputBuffer(output, signature)
        try {
            model.run(feed, mapOf(output to found), signature)
            return found.readFloat()
        } finally {
            (feed.values + found).forEach { it.close() }
        }
    }

    override fun close() = model.close()

    private companion object {
        val INPUTS = listOf({{inputs}})
        val SIGNATURES = listOf({{signatures_kotlin}}) // with their lengths, shortest first; 0: one size
    }
}
